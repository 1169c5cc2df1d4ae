"""Any model of timm as a backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from coeft.errors import UserError

if TYPE_CHECKING:
    from coeft.backbones._backbone import Backbone

# Arguments of timm.create_model that coeft sets itself, or that would change what is built behind its back.
RESERVED = (
    "model_name", "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
    "cache_dir", "features_only", "scriptable", "exportable", "no_jit", "device", "dtype",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timm:
    """Settings of a timm backbone."""

    kind: str = "timm"
    name: str = MISSING
    """A name of timm.list_models(), such as vit_base_patch16_224, with or without a pre-trained tag after a dot."""
    pretrained: bool = True
    """false starts from random weights drawn from the seed, also where `weights` names a file."""
    weights: str | None = None
    """A file of weights, safetensors or a torch state dict; package://NAME is one that coeft ships. null takes timm's
    own from the Hugging Face cache or hub. A classifier in the file is dropped: the task gets a fresh one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as drop_path_rate, img_size, patch_size, embed_dim, depth."""

    def __post_init__(self) -> None:
        if not self.name or self.name == MISSING:
            raise UserError("backbone.name is missing: a name of timm, such as vit_small_patch16_224")
        reserved = sorted(set(self.options) & set(RESERVED))
        if reserved:
            raise UserError(f"backbone.options: {', '.join(reserved)} cannot be set here; the config does")

    def build(
        self,
        num_classes: int,
        seed: int,
        image_size: int | tuple[int, int] | list[int] | None = None,
        *,
        head: str = "classifier",
    ) -> Backbone:
        """The model with its weights and a fresh classifier, and its facts.

        Random weights depend on the seed alone, so that every fold and a later evaluation get the same ones.

        Args:
            num_classes: outputs of the classifier; 0 leaves it out (Backbone.new_head makes one later).
            seed: of the random weights and of the classifier.
            image_size: pixels, one number or (height, width); null is the model's own. Position embeddings of the
                weights are resampled by timm.
            head: classifier; timm has no language models.

        Raises:
            UserError: timm has no such model, weights or option; the file does not fit; the model cannot take the
                image size; there is neither a cached copy nor a network; a language model was asked for.
        """
        if head != "classifier":
            raise UserError("task: timm has no language models; take a backbone of kind hf, such as smollm2_135m")
        from coeft.backbones._timm import build

        return build(self, num_classes, seed, image_size)

    def code(self, image_size: int | None) -> str:
        """The lines of Python that make this base model with timm alone, for a model card."""
        options = dict(self.options)
        if image_size is not None:
            options["img_size"] = image_size
        hub = self.pretrained and self.weights is None
        arguments = [repr(self.name), *(["pretrained=True"] if hub else [])]
        arguments += [f"{name}={value!r}" for name, value in options.items()]
        lines = f"import timm\n\nmodel = timm.create_model({', '.join(arguments)})"
        if self.pretrained and self.weights is not None:
            file = Path(self.weights).name
            lines += f"\n# then load its weights, {file}, by model.load_state_dict(..., strict=False)"
        return lines
