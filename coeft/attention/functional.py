"""Attention whose maps are mixed across heads: the fused route of Coeff-Tuning."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coeft.attention.blockwise import blockwise

Implementation = Literal["auto", "reference", "blockwise"]
IMPLEMENTATIONS = ("auto", "reference", "blockwise")

LARGE = 1 << 20
"""Entries of all maps from which blocks are faster than whole maps: less than that stays in the cache anyhow."""
LONG = 1 << 13
"""Query tokens times key tokens from which blocks are faster, however many items there are: about 90 squared."""


def prefers_blocks(items: int, heads: int, queries: int, keys: int) -> bool:
    """Whether implementation="auto" takes the blockwise form for such maps. Measured: see docs/performance.md."""
    return queries * keys >= LONG and items * heads * queries * keys >= LARGE


def coeff_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """Scaled dot-product attention in which head g attends with sum_h coeff[g, h] * maps[h].

        maps_h = dropout(softmax(q_h k_h^T * scale + mask))     out_g = (sum_h coeff[g, h] maps_h) v_g

    Arguments are those of `torch.nn.functional.scaled_dot_product_attention`, and mean the same; with coeff = I so
    does the result. Two implementations of one function:

        reference    holds all maps of all heads; float32 inside where the inputs are of half precision; differentiable
                     any number of times, also for a float mask
        blockwise    exact too, by blocks of query rows: memory linear in the tokens, faster for more than about a
                     hundred; differentiable once; in half precision it rounds between matrix products
                     (coeft/attention/blockwise.py); its dropout draws another sequence, and
                     rounds the probability to a multiple of 2^-16
        auto         blockwise where it is faster (`prefers_blocks`), unless the mask wants a gradient

    Args:
        query: (..., H, N, E). Leading dimensions broadcast.
        key: (..., H, M, E), or with enable_gqa (..., H_kv, M, E) where H_kv divides H.
        value: (..., H, M, D), or with enable_gqa (..., H_kv, M, D); query head g uses value head g // (H / H_kv).
        coeff: (H, H), the full mixing matrix I + alpha, over query heads. Any float type.
        attn_mask: broadcastable to (..., H, N, M); bool (True takes part) or float (added to the scores). A masked
            position is exactly zero in every combination. A row that is masked everywhere gives zeros, as in torch.
        dropout_p: probability of zeroing an entry of a map, before mixing. Applied whenever positive, as in torch.
        is_causal: query i sees keys 0 to i. Not together with attn_mask.
        scale: factor of the scores; None is 1 / sqrt(E).
        enable_gqa: allow fewer key and value heads than query heads.
        implementation: one of the above.

    Returns:
        (..., H, N, D) in the type of the inputs.

    Raises:
        ValueError: shapes, types or options that do not fit each other.

    Source: Miao et al. 2025, arXiv:2503.18337.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch does for its own attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, coeff, attn_mask, dropout_p, is_causal, enable_gqa)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"coeff_attention: implementation must be {', '.join(IMPLEMENTATIONS)}, not {implementation!r}"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    learned_mask = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if implementation == "blockwise" and learned_mask:
        raise ValueError("coeff_attention: implementation='blockwise' has no gradient for attn_mask; take 'reference'")
    if implementation == "auto" and not learned_mask:
        items = math.prod(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
        if prefers_blocks(items, query.shape[-3], query.shape[-2], key.shape[-2]):
            implementation = "blockwise"
    if implementation == "blockwise":
        return _in_blocks(query, key, value, coeff, attn_mask, dropout_p, is_causal, scale)
    dtype = query.dtype
    exact = torch.promote_types(dtype, torch.float32)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    with torch.autocast(device, enabled=False):
        scores = (query.to(exact) * scale) @ key.to(exact).transpose(-2, -1)  # (..., H, N, M)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        maps = _softmax(scores, attn_mask)
        if dropout_p > 0:
            maps = F.dropout(maps, dropout_p)
        mixed = (coeff.to(exact) @ maps.flatten(-2)).unflatten(-1, maps.shape[-2:])
        return (mixed @ value.to(exact)).to(dtype)


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Leading dimensions as one, and sizes of zero."""
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    if 0 in (*leading, *query.shape[-3:], key.shape[-2], value.shape[-1]):
        # nothing to attend to or with: zeros that depend on the inputs, as autograd wants them
        shape = (*leading, *query.shape[-3:-1], value.shape[-1])
        return query.new_zeros(shape) + 0 * (query.sum() + key.sum() + value.sum() + coeff.sum().to(query.dtype))
    if mask is not None and len(leading) != 1:
        mask = mask.reshape((1,) * (3 - mask.dim()) + mask.shape)  # heads, queries and keys stay as narrow as they are
        mask = mask.expand(*leading, *mask.shape[-3:]).flatten(0, -4) if mask.dim() > 3 else mask.unsqueeze(0)
    elif mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    query, key, value = (t.expand(*leading, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    out = blockwise(query, key, value, coeff, mask, dropout_p, is_causal, scale)
    return out if len(leading) == 1 else out.reshape(*leading, *out.shape[1:])


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Masked softmax over the last dimension. Rows without any key give zeros, and no NaN in their gradients."""
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    def fail(what: str) -> ValueError:
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        return ValueError(f"coeff_attention: {what}; got {shapes}, coeff {list(coeff.shape)}")

    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise fail("query, key and value need at least the dimensions (heads, tokens, head size)")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        types = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise ValueError(f"coeff_attention: query, key and value must have one float type, not {types}")
    if query.shape[-1] != key.shape[-1]:
        raise fail("query and key must have the same head size (last dimension)")
    if key.shape[-2] != value.shape[-2]:
        raise fail("key and value must have the same number of tokens (dimension -2)")
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads != value.shape[-3]:
        raise fail("key and value must have the same number of heads (dimension -3)")
    if enable_gqa and (kv_heads == 0 or heads % kv_heads):
        raise fail("the number of key heads must divide the number of query heads")
    if not enable_gqa and heads != kv_heads:
        raise fail("query and key must have the same number of heads; enable_gqa=True allows fewer key heads")
    if coeff.shape != (heads, heads) or not coeff.dtype.is_floating_point:
        raise fail(f"coeff must be a float matrix over the query heads, ({heads}, {heads})")
    try:
        leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise fail("the leading dimensions of query, key and value do not fit each other") from None
    if mask is not None:
        if is_causal:
            raise ValueError("coeff_attention: is_causal excludes attn_mask; put the causal part into the mask")
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(f"coeff_attention: attn_mask must be bool or float, not {mask.dtype}")
        target = (*leading, heads, query.shape[-2], key.shape[-2])
        try:
            fits = torch.broadcast_shapes(mask.shape, target) == target
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"coeff_attention: attn_mask {list(mask.shape)} does not broadcast to (..., heads, query tokens, "
                f"key tokens) = {list(target)}"
            )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"coeff_attention: dropout_p must be in [0, 1], not {dropout_p}")
