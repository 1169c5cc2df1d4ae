"""What the rest of coeft knows about a model: facts, not how it was built."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coeft.attention.site import AttentionSite
from coeft.errors import UserError
from coeft.seeding import reseed


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What an image goes through before the model sees it."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    interpolation: str
    """bicubic, bilinear or nearest."""
    crop_pct: float
    """Share of the resized image's shorter side that the centre crop keeps (resize=crop only)."""
    resize: str = "crop"
    """crop: resize the shorter side, then crop the centre. squash: resize both sides, as VTAB-1k does."""


@dataclass(frozen=True, kw_only=True)
class Fbank:
    """The features that a model of sound takes: Kaldi's log energies of mel bands, as a sequence of frames."""

    sample_rate: int
    """Hz."""
    bands: int
    """Mel bands of a frame."""
    frames: int
    """Of a clip, 10 ms each; shorter ones are filled up with zeros, before they are normalised."""
    mean: float
    std: float
    """Features are given as (features - mean) / (2 std)."""


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """What a sound goes through before the model sees it."""

    sample_rate: int
    """Hz that it is resampled to."""
    seconds: float
    """Length that it is cut or filled up to."""
    longer: str
    """centre or start: what is kept of a longer one."""
    shorter: str
    """zeros or repeat: what fills up a shorter one."""
    features: Any
    """Fbank where the model takes sound; data.spectrogram where it takes the picture of one."""

    @property
    def samples(self) -> int:
        """Of a clip."""
        return round(self.seconds * self.sample_rate)


@dataclass(kw_only=True)
class Backbone:
    """A model with a fresh head, and the facts that methods and training need."""

    name: str
    """Such as vit_base_patch16_224."""
    kind: str
    """The config's backbone kind: timm or hf."""
    model: nn.Module
    modality: str = "image"
    """What the model takes: image, text or audio."""
    preprocessing: Preprocessing | None = None
    """Of images."""
    fbank: Fbank | None = None
    """Of a model of sound."""
    hearing: Hearing | None = None
    """Where the data is sound: what is made of it for the model."""
    tokenizer: Any = None
    """Of text: a PreTrainedTokenizerBase."""
    sites: list[AttentionSite] = field(default_factory=list)
    """Attention layers that can be mixed, in the order of the forward."""
    refusal: str | None = None
    """Why attention methods cannot attach, when `sites` is empty."""
    blocks: list[str] = field(default_factory=list)
    """Names of the transformer blocks, in order; `layers` of weight methods counts these."""
    head: str = "head"
    """Module name of the task head; "" where there is none, as in a causal language model."""
    scale: tuple[float, float] | None = None
    """What `rescale_head` was called with; None is no scale."""
    _unscale: RemovableHandle | None = field(default=None, repr=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of prepared inputs: images under `pixel_values`, normalised, or tokens under `input_ids` and others.

        Keys that the model does not take, such as `labels`, are left alone. (B, num_outputs), or of a causal language
        model (B, T, vocabulary).
        """
        logits: Tensor = self.model(batch["pixel_values"])
        return logits

    def example(self) -> dict[str, Tensor]:
        """A batch of one blank sample, before normalisation: an image, a sound, or 128 tokens."""
        if self.hearing is not None:
            return {"sound": torch.zeros(1, self.hearing.samples)}
        if self.preprocessing is None:
            tokens = torch.zeros(1, 128, dtype=torch.int64)
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        channels = len(self.preprocessing.mean)
        return {"pixel_values": torch.zeros(1, channels, *self.preprocessing.image_size, dtype=torch.uint8)}

    @property
    def data_modality(self) -> str:
        """The modality of the data: that of the model, but audio where a model of images sees pictures of sounds."""
        return "audio" if self.hearing is not None else self.modality

    @property
    def heads(self) -> list[str]:
        """Names of the modules that are drawn, trained and stored for the task: the head, if there is one."""
        return [self.head] if self.head else []

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter of the task head; nothing where there is none."""
        return {
            f"{head}.{name}": parameter
            for head in self.heads
            for name, parameter in self.model.get_submodule(head).named_parameters()
        }

    def rescale_head(self, mean: float, deviation: float) -> None:
        """Let the head give mean + deviation * (its own output): numbers in the units of the data, for regression.

        It takes the place of a scale that was set before; a fresh head has none.
        """
        if self._unscale is not None:
            self._unscale.remove()

        def scaled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            return output.float() * deviation + mean

        self.scale = (mean, deviation)
        self._unscale = self.model.get_submodule(self.head).register_forward_hook(scaled)

    def fold_scale(self) -> None:
        """Write the scale of `rescale_head` into the head's last linear layer, for a model without coeft.

        Raises:
            UserError: that layer has no bias, which would hold the mean.
        """
        if self.scale is None or self._unscale is None:
            return
        mean, deviation = self.scale
        layers = [m for m in self.model.get_submodule(self.head).modules() if isinstance(m, nn.Linear)]
        if not layers or layers[-1].bias is None:
            raise UserError(
                f"the head of {self.name} has no bias to hold the mean of the numbers, {mean:g}: export the adapter"
            )
        with torch.no_grad():
            layers[-1].weight.mul_(deviation)
            layers[-1].bias.mul_(deviation).add_(mean)
        self._unscale.remove()
        self.scale = self._unscale = None

    def new_head(self, num_outputs: int, seed: int) -> None:
        """Replace the task head by a fresh one, drawn from the seed as the model's own code draws it."""
        reseed(seed, "head")
        self.model.reset_classifier(num_outputs)  # type: ignore[operator]
