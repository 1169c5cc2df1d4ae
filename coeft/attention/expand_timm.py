"""Head expansion of timm's attention layers, and the code that loads the result with timm alone.

timm's models give their layers as many heads as the width allows; these classes can have more (`attn_head_dim`), so
that the expanded model is stock timm layers put into the stock model: see `load`, whose source goes into model cards.
Read from timm 1.0.31.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coeft.expand import Heads, expand

# class -> the class of timm that holds its expanded form
EXPANDABLE = {
    "timm.layers.attention.Attention": "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope": "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention": "timm.layers.attention.AttentionRope",
    "timm.models.swin_transformer.WindowAttention": "timm.models.swin_transformer.WindowAttention",
}


def load(folder: str):
    """The model of a folder; the layers that "expanded_attention" of config.json names have more heads than usual."""
    import json

    import timm
    from safetensors.torch import load_file

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        expanded = json.load(file)["expanded_attention"]
    model = timm.create_model(f"local-dir:{folder}")
    for name, options in expanded.items():
        old = model.get_submodule(name)
        kind = timm.layers.AttentionRope if type(old).__name__ == "EvaAttention" else type(old)
        new = kind(**options)
        for child in ("q_norm", "k_norm", "attn_drop", "proj_drop"):
            if hasattr(old, child):
                setattr(new, child, getattr(old, child))
        model.set_submodule(name, new)
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return model.eval()


def refusal(module: nn.Module) -> str | None:
    """Why a layer cannot be expanded; None if it can."""
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" not in EXPANDABLE:
        return f"{cls.__qualname__} ({cls.__module__}) cannot have more heads than the width allows"
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return f"{cls.__qualname__} norms the outputs of all heads together, which head expansion would change"
    return None


@torch.no_grad()
def rewrite(layer: nn.Module, mixing: Tensor, threshold: float = 0.0) -> tuple[Heads, dict[str, Any]]:
    """Expand the weights of a layer in place, so that its state dict is that of the expanded layer.

    The layer itself cannot run any more.

    Args:
        mixing: I + alpha, (H, H).

    Returns:
        Its heads, and the arguments of the class that holds them, as JSON has them.
    """
    module: Any = layer
    groups = module.num_heads // getattr(module, "num_kv_heads", module.num_heads)
    gate = getattr(module, "gate", None)
    if groups > 1 and gate is not None:  # each output head has a gate of its own, so that values are not shared
        repeat = partial(_repeat, heads=module.num_heads, groups=groups)
        _apply(module.k_proj, repeat)
        _apply(module.v_proj, repeat)
        groups = 1
    heads = expand(mixing, module.num_heads // groups, threshold)
    heads = heads.padded(max(1, heads.num_kv_heads))
    head_dim = module.proj.in_features // module.num_heads
    if getattr(module, "qkv", None) is not None:
        _rewrite_joint(module, heads)
    else:
        _rewrite_apart(module, heads)
    if gate is not None:
        _apply(gate, heads.of_values)
    module.proj.weight = _frozen(heads.of_outputs(module.proj.weight))
    if hasattr(module, "relative_position_bias_table"):  # (positions, H)
        table = heads.of_keys(module.relative_position_bias_table.T).T
        module.relative_position_bias_table = _frozen(table.contiguous())
    return heads, _arguments(module, heads, head_dim)


def _rewrite_joint(module: Any, heads: Heads) -> None:
    """qkv: rows of all queries, of all keys, of all values."""
    if getattr(module, "q_bias", None) is not None:  # EVA keeps the biases apart; that of the keys is zero
        module.qkv.bias = _frozen(torch.cat([module.q_bias, module.k_bias, module.v_bias]))
        module.q_bias = module.v_bias = None

    def pick(rows: Tensor) -> Tensor:
        query, key, value = rows.chunk(3)
        return torch.cat([heads.of_keys(query), heads.of_keys(key), heads.of_values(value)])

    _apply(module.qkv, pick)


def _rewrite_apart(module: Any, heads: Heads) -> None:
    if module.q_proj.bias is not None and module.k_proj.bias is None:  # EVA has none for the keys
        module.k_proj.bias = _frozen(torch.zeros_like(module.k_proj.weight[:, 0]))
    _apply(module.q_proj, heads.of_keys)
    _apply(module.k_proj, heads.of_keys)
    _apply(module.v_proj, heads.of_values)


def _arguments(module: Any, heads: Heads, head_dim: int) -> dict[str, Any]:
    """Arguments of the class that holds the expanded layer."""
    joint = getattr(module, "qkv", None) is not None
    first = module.qkv if joint else module.q_proj
    common = {"dim": first.in_features, "num_heads": heads.num_heads, "qkv_bias": first.bias is not None}
    if hasattr(module, "window_size"):
        return common | {"head_dim": head_dim, "window_size": list(module.window_size)}
    common |= {
        "attn_head_dim": head_dim,
        "dim_out": module.proj.out_features,
        "proj_bias": module.proj.bias is not None,
        "gated": module.gate is not None,
    }
    if not hasattr(module, "num_prefix_tokens"):
        return common
    return common | {
        "qkv_fused": joint,
        "num_kv_heads": heads.num_kv_heads,
        "num_prefix_tokens": module.num_prefix_tokens,
        "rotate_half": getattr(module, "rotate_half", False),
    }


def _apply(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change the rows of a linear layer's weight, and its bias alike."""
    layer.weight = _frozen(change(layer.weight))
    if layer.bias is not None:
        layer.bias = _frozen(change(layer.bias))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _repeat(rows: Tensor, heads: int, groups: int) -> Tensor:
    """Rows of key-value heads -> rows of the query heads that use them."""
    return rows.unflatten(0, (heads // groups, -1)).repeat_interleave(groups, 0).flatten(0, 1)
