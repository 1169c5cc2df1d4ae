"""The facts of transformers models that are already built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from coeft.attention.hf import find_sites
from coeft.attention.site import AttentionSite
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.seeding import reseed

# what transformers calls the classifier of ...ForSequenceClassification, ...ForImageClassification and their like
HEADS = ("classifier", "score", "classification_head")


@dataclass(kw_only=True)
class HFBackbone(Backbone):
    """A transformers model. `head` is "" where it has no classifier, as a causal language model has none."""

    kind: str = "hf"

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits, see Backbone.forward."""
        output = self.model(**batch)
        logits: Tensor = output["logits"] if "logits" in output else output[0]
        return logits

    def new_head(self, num_outputs: int, seed: int) -> None:
        """Draw the classifier anew, as the model's own code draws it.

        Raises:
            UserError: the model has no classifier, or one for another number of classes.
        """
        model = cast(Any, self.model)
        if not self.head or model.config.num_labels != num_outputs:
            has = f"a classifier for {model.config.num_labels} classes" if self.head else "no classifier"
            raise UserError(f"{self.name} has {has}, not for {num_outputs}: load it with num_labels={num_outputs}")
        reseed(seed, "head")
        for module in model.get_submodule(self.head).modules():
            module._is_hf_initialized = False
            model._init_weights(module)


def describe(model: nn.Module, *, name: str | None = None, inputs: Mapping[str, Any] | None = None) -> HFBackbone:
    """The facts of a transformers model that is already built.

    Runs one small forward, see coeft.attention.hf.find_sites.

    Args:
        name: as the user gave it; null is what the model was loaded from, else its class.
        inputs: keyword arguments of that forward, where coeft's own do not fit the model.

    Raises:
        UserError: the model is not one of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is not a model of transformers")
    sites, refusal = find_sites(model, inputs)
    return HFBackbone(
        name=name or model.config._name_or_path or type(model).__name__,
        model=model,
        modality="image" if model.main_input_name == "pixel_values" else "text",
        sites=sites,
        refusal=refusal,
        blocks=block_names(model, sites),
        head=head_name(model),
    )


def head_name(model: nn.Module) -> str:
    """Module name of the classifier, "" where there is none."""
    children = dict(model.named_children())
    return next((name for name in HEADS if children.get(name) is not None), "")


def block_names(model: nn.Module, sites: Sequence[AttentionSite]) -> list[str]:
    """Names of the transformer blocks that hold the sites, in the order of the forward.

    A block is what transformers checkpoints as one (GradientCheckpointingLayer), the nearest around a site; else the
    outermost entry of a ModuleList around it. Without sites, every such layer.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    if not sites:
        return blocks
    entries = [
        f"{name}.{child}" for name, m in model.named_modules() if isinstance(m, nn.ModuleList) for child in m._modules
    ]
    found: dict[str, None] = {}
    for site in sites:
        around = [name for name in blocks if site.name.startswith(f"{name}.")]
        outer = [name for name in entries if site.name.startswith(f"{name}.")]
        found.setdefault(max(around, key=len, default=min(outer, key=len, default=site.name)))
    return list(found)
