"""What the rest of coeft knows about a model: facts, not how it was built."""

from dataclasses import dataclass, field

from torch import nn

from coeft.attention.site import AttentionSite
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


@dataclass(kw_only=True)
class Backbone:
    """A model with a fresh head, and the facts that methods and training need."""

    name: str
    """Such as vit_base_patch16_224."""
    kind: str
    """The config's backbone kind: timm."""
    model: nn.Module
    preprocessing: Preprocessing
    sites: list[AttentionSite] = field(default_factory=list)
    """Attention layers that can be mixed, in the order of the forward."""
    refusal: str | None = None
    """Why attention methods cannot attach, when `sites` is empty."""
    blocks: list[str] = field(default_factory=list)
    """Names of the transformer blocks, in order; `layers` of weight methods counts these."""
    head: str = "head"
    """Module name of the classifier."""

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter of the task head."""
        module = self.model.get_submodule(self.head)
        return {f"{self.head}.{name}": parameter for name, parameter in module.named_parameters()}

    def new_head(self, num_classes: int, seed: int) -> None:
        """Replace the classifier by a fresh one, drawn from the seed as the model's own code draws it."""
        reseed(seed, "head")
        self.model.reset_classifier(num_classes)  # type: ignore[operator]
