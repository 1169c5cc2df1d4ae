"""Head expansion of transformers models, so that their own classes load and run the result.

Only models whose config can say how many heads there are and, apart from the width, how large each is (`head_dim`);
those below were read in transformers 5.23 and have a test. One config holds for all layers: layers that need fewer
heads get added ones, which give zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from coeft.attention.site import AttentionSite
from coeft.errors import UserError
from coeft.expand import Heads, expand


@dataclass(frozen=True)
class Layout:
    """How the attention class of a model holds its projections."""

    attention: str
    """Name of the class."""
    joint: str = ""
    """Name of the projection that holds queries, keys and values in this order; else q_proj, k_proj and v_proj."""
    grouped: bool = True
    """Whether the config has num_key_value_heads."""


# model_type -> layout
EXPANDABLE = {
    "llama": Layout("LlamaAttention"),
    "mistral": Layout("MistralAttention"),
    "qwen2": Layout("Qwen2Attention"),
    "qwen3": Layout("Qwen3Attention"),
    "gemma2": Layout("Gemma2Attention"),
    "gemma3_text": Layout("Gemma3Attention"),
    "gpt_oss": Layout("GptOssAttention"),
    "phi3": Layout("Phi3Attention", joint="qkv_proj"),
    "vit": Layout("ViTAttention", grouped=False),
    "dinov2": Layout("Dinov2Attention", grouped=False),
    "audio-spectrogram-transformer": Layout("ASTAttention", grouped=False),
}
TRIES = 4
"""How many times the heads that are needed to look for a number of heads that the config allows."""


def refusal(model: nn.Module, sites: Sequence[AttentionSite]) -> str | None:
    """Why a model cannot be expanded; None if it can, as far as its classes tell."""
    config = cast(Any, model).config
    layout = EXPANDABLE.get(config.model_type)
    if layout is None:
        return (
            f"the classes of transformers for {config.model_type} are not known to run with more heads than the width "
            f"allows; it is known of {', '.join(EXPANDABLE)}"
        )
    others = {type(site.module).__name__ for site in sites} - {layout.attention}
    if others:
        return f"its layers are {', '.join(sorted(others))}, not {layout.attention}"
    names = [layout.joint] if layout.joint else ["q_proj", "k_proj", "v_proj"]
    layers = [site.module.get_submodule(name) for site in sites for name in [*names, "o_proj"]]
    kinds = {getattr(layer, "base_type", type(layer)) for layer in layers} - {nn.Linear}  # AdaptedLinear says of what
    if kinds:
        return f"its projections are {', '.join(sorted(kind.__qualname__ for kind in kinds))}, not plain linear layers"
    return None


@torch.no_grad()
def rewrite(
    model: nn.Module, sites: Sequence[AttentionSite], mixings: Mapping[str, Tensor], threshold: float = 0.0
) -> dict[str, Heads]:
    """Expand every attention layer and the config in place, so that save_pretrained writes the expanded model.

    The model itself cannot run any more.

    Args:
        sites: all attention layers of the model.
        mixings: name of a site -> I + alpha, (H, H); layers without an entry are not mixed.

    Returns:
        Name of each site -> its heads.

    Raises:
        UserError: no number of heads fits the config.
    """
    config = cast(Any, model).config
    layout = EXPANDABLE[config.model_type]
    kv_heads = config.num_key_value_heads if layout.grouped else config.num_attention_heads
    identity = torch.eye(config.num_attention_heads, dtype=torch.float64)
    heads = {
        site.name: expand(mixings.get(site.name, identity), kv_heads, threshold if site.name in mixings else 0.0)
        for site in sites
    }
    head_dim = cast(Any, sites[0].module).head_dim
    changes = _fitting(config, layout, max(1, *(h.num_kv_heads for h in heads.values())), kv_heads, head_dim)
    length = changes["num_attention_heads"] * kv_heads // config.num_attention_heads
    for site in sites:
        heads[site.name] = heads[site.name].padded(length)
        _rewrite(site.module, layout, heads[site.name], head_dim)
    for key, value in changes.items():
        setattr(config, key, value)
    return heads


def _fitting(config: Any, layout: Layout, needed: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Settings of the config with the fewest key-value heads, at least `needed`, that the config class accepts."""
    groups = config.num_attention_heads // kv_heads
    for length in range(needed, TRIES * needed + 1):
        changes = {"num_attention_heads": length * groups, "head_dim": head_dim}
        if layout.grouped:
            changes["num_key_value_heads"] = length
        try:
            type(config).from_dict({**config.to_dict(), **changes})
        except Exception as error:  # of huggingface_hub, of a class that it makes
            reason = str(error).splitlines()[-1].strip()
            continue
        return changes
    raise UserError(
        f"--coeff expand: {needed * groups} heads are needed, but the config of {config.model_type} refuses "
        f"{needed * groups} to {TRIES * needed * groups} heads ({reason}); take --coeff keep"
    )


def _rewrite(layer: nn.Module, layout: Layout, heads: Heads, head_dim: int) -> None:
    module: Any = layer
    groups = heads.output.shape[-1]
    if layout.joint:
        joint = module.get_submodule(layout.joint)
        query = heads.before * groups * head_dim
        sizes = [query, heads.before * head_dim, heads.before * head_dim]

        def pick(rows: Tensor) -> Tensor:
            queries, keys, values = rows.split(sizes)
            return torch.cat([heads.of_keys(queries), heads.of_keys(keys), heads.of_values(values)])

        _set(joint, pick)
    else:
        _set(module.q_proj, heads.of_keys)
        _set(module.k_proj, heads.of_keys)
        _set(module.v_proj, heads.of_values)
    module.o_proj.weight = _frozen(heads.of_outputs(module.o_proj.weight))
    if getattr(module, "sinks", None) is not None:  # one a query head
        module.sinks = _frozen(heads.of_keys(module.sinks))


def _set(layer: nn.Linear, pick: Any) -> None:
    layer.weight = _frozen(pick(layer.weight))
    if layer.bias is not None:
        layer.bias = _frozen(pick(layer.bias))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
