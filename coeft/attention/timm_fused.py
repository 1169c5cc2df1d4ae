"""The fused route: attention layers of timm that hand their whole attention to the mixer, without holding their maps.

For classes whose attention is plain scaled-dot-product attention with an optional mask or bias. Such a layer gets, on
the instance, a forward that projects as timm does and calls the mixer with query, key and value; no module is wrapped
or renamed, and the forward is a partial of a function of this file, so that models can be copied and pickled.

The forwards here stand for timm's, so each is used only while the source of timm's own has the digest in FUSED. After
an update of timm that changes it, the layer keeps the route over its maps, and `dry_run` shows that. The layer also
goes over its maps whenever that is faster, and whenever somebody else hooks `attn_drop` to see them.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F


def offer(module: nn.Module) -> bool:
    """Whether the module can take the fused route: a known class with the known forward, which nobody replaced."""
    key = _key(type(module))
    return key in FUSED and digest(type(module)) == FUSED[key][1] and "forward" not in vars(module)


def install(module: nn.Module) -> None:
    """Give the module, which holds a mixer as `coeff_mix`, the forward of its class."""
    function, _ = FUSED[_key(type(module))]
    vars(module)["forward"] = partial(_forward, function, module)


def uninstall(module: nn.Module) -> None:
    """Give the module the forward of its class again, if it has the one of this file."""
    installed = vars(module).get("forward")
    if isinstance(installed, partial) and installed.func is _forward:
        del vars(module)["forward"]


def digest(cls: type[nn.Module]) -> str:
    """Of the source of a class's forward; empty if there is no source."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _forward(function: Callable[..., Tensor], module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Exactly the mixer's hook on attn_drop: a second one wants to see the maps; without it (attn_drop was replaced) or
    # with fused_attn switched on, timm's own forward passes the mixer by, which the mixer's guard reports.
    alone = len(module.attn_drop._forward_hooks) == 1
    if alone and not module.fused_attn and module.coeff_mix.takes_all(x.shape[0], x.shape[1], x.shape[1]):
        return function(module, x, *args, **kwargs)
    return type(module).forward(module, x, *args, **kwargs)


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """q (B, H, N, E) ... -> (B, N, H * D). A causal layer ignores its mask, as in timm."""
    dropout_p = module.attn_drop.p if module.training else 0.0
    options = {"attn_mask": None if is_causal else mask, "dropout_p": dropout_p, "is_causal": is_causal}
    options["enable_gqa"] = k.shape[1] != q.shape[1]
    return module.coeff_mix(q, k, v, **options).transpose(1, 2).flatten(2)


def _project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, N, E) of a layer with a joint `qkv`, and maybe biases of query and value apart."""
    if getattr(module, "q_bias", None) is None:
        joint = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        if module.qkv_bias_separate:  # so that an adapted linear layer is called
            joint = module.qkv(x) + bias
        else:
            joint = F.linear(x, module.qkv.weight, bias)
    q, k, v = joint.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _heads(x: Tensor, number: int) -> Tensor:
    """(B, N, number * E) -> (B, number, N, E)."""
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def _rotate(module: Any, x: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary positions for all tokens but the prefix."""
    prefix, rest = x[:, :, : module.num_prefix_tokens], x[:, :, module.num_prefix_tokens :]
    half = getattr(module, "rotate_half", False)
    return torch.cat((prefix, apply_rot_embed_cat(rest, rope, half=half)), 2).to(dtype)


def _standard(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm.layers.attention.Attention."""
    return _rotary(module, x, None, attn_mask, is_causal)


def _rotary(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm.layers.attention.AttentionRope and timm.models.eva.EvaAttention."""
    if module.qkv is not None:
        q, k, v = _project(module, x)
    else:
        kv_heads = getattr(module, "num_kv_heads", module.num_heads)
        q, k, v = (
            _heads(layer(x), number)
            for layer, number in (
                (module.q_proj, module.num_heads),
                (module.k_proj, kv_heads),
                (module.v_proj, kv_heads),
            )
        )
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        q, k = _rotate(module, q, rope, v.dtype), _rotate(module, k, rope, v.dtype)
    y = module.norm(_attend(module, q, k, v, attn_mask, is_causal))
    if module.gate is not None:
        y = y * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(y))


def _relative(module: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """timm.models.vision_transformer_relpos.RelPosAttention: its own bias, else the shared one."""
    q, k, v = _project(module, x)
    bias = shared_rel_pos if module.rel_pos is None else module.rel_pos.get_bias()
    y = _attend(module, module.q_norm(q), module.k_norm(k), v, bias)
    return module.proj_drop(module.proj(y))


def _beit(module: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm.models.beit.Attention: the sum of its own and the shared bias."""
    q, k, v = _project(module, x)
    bias = shared_rel_pos_bias
    if module.relative_position_bias_table is not None:
        own = module._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return module.proj_drop(module.proj(_attend(module, q, k, v, bias)))


def _parallel(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm.models.vision_transformer.ParallelScalingBlock: attention beside an MLP, from one projection."""
    hidden, q, k, v = module.in_proj(module.in_norm(x)).split(module.in_split, -1)
    if module.mlp_bias is not None:
        hidden = hidden + module.mlp_bias
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (module.q_norm(q), module.k_norm(k), v))
    attended = _attend(module, q, k, v, attn_mask, is_causal)
    hidden = module.mlp_drop(module.mlp_act(hidden))
    if module.out_proj is not None:
        y = module.out_proj(torch.cat((attended, hidden), -1))
    else:
        y = module.attn_out_proj(attended) + module.mlp_out_proj(hidden)
    return x + module.drop_path(module.ls(y))


# class -> (forward, digest of the source of timm's own)
FUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "timm.layers.attention.Attention": (_standard, "37a80e0fdf45af9c"),
    "timm.layers.attention.AttentionRope": (_rotary, "3f742ca1632dca04"),
    "timm.models.eva.EvaAttention": (_rotary, "ab5e17e344c38aae"),
    "timm.models.vision_transformer_relpos.RelPosAttention": (_relative, "a38419a4d20b4ef8"),
    "timm.models.beit.Attention": (_beit, "0bcb86fe6e1f3788"),
    "timm.models.vision_transformer.ParallelScalingBlock": (_parallel, "19c3e45701ce1613"),
}
