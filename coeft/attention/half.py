"""Plain attention in half precision on the CPU, with a backward pass that uses the fast matrix products.

torch's own CPU kernel multiplies bf16 in hardware in the forward pass, and not in the backward pass, which takes up to
fifty times as long as the forward (docs/performance.md). `fast_attention()` puts another backward pass in its place
wherever a model calls torch's scaled_dot_product_attention: the maps are formed again from queries and keys, some items
at a time, so that memory is linear in the tokens as before. The forward pass is torch's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ENTRIES = 1 << 22
"""Entries of maps that the backward pass holds at a time, of one head at least."""
SMALL = 1 << 11
"""Key tokens times head size below which torch's float32 kernel is the fastest."""
MIN_ROWS = 256
"""Query rows of a block at least, where even one head is divided."""


class _Attention(torch.autograd.Function):
    """torch's forward and the backward pass of this file. q, k, v (B, H, N, E); the mask bool or float, or None."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        found = _gradients(grads[0], query, key, value, mask, ctx.causal, ctx.scale, ctx.needs_input_grad)
        return (*found, None, None, None)


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, each None where it is not needed; blocks of items and heads at a time."""
    items, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    each = rows * key.shape[2]  # entries of one map
    many = max(1, ENTRIES // (heads * each))
    wide = heads if many > 1 else min(heads, max(1, ENTRIES // each))
    found = [torch.empty_like(t) if need else None for t, need in zip((query, key, value), needs, strict=False)]
    for item in _blocks(items, many):
        for head in _blocks(heads, wide):
            g, q, k, v = (t[item, head].flatten(0, 1) for t in (grad, query, key, value))
            hidden = None if mask is None else mask[_part(mask, 0, item), _part(mask, 1, head)]
            shape = (item.stop - item.start, head.stop - head.start)
            parts = _block_gradients(g, q, k, v, hidden, shape, causal, scale, needs)
            for whole, part in zip(found, parts, strict=True):
                if whole is not None:
                    whole[item, head] = part.unflatten(0, shape)
    if groups > 1:
        for which in (1, 2):
            if (repeated := found[which]) is not None:
                found[which] = repeated.unflatten(1, (-1, groups)).sum(2, dtype=torch.float32).to(query.dtype)
    return found[0], found[1], found[2]


def _block_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shape: tuple[int, int],
    causal: bool,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As _gradients, for n = items * heads maps: (n, N, E) and the like; what is not needed is left as it comes.

    Where the maps of one head are too large, and of causal attention, the rows go by blocks too, and their shares of
    the gradients of keys and values are added up in float32.

    Args:
        shape: items and heads.
    """
    (count, rows, _), columns = query.shape, key.shape[1]
    height = min(rows, max(MIN_ROWS, ENTRIES // (count * columns)))
    if causal:
        height = min(height, max(MIN_ROWS, -(-rows // 4)))
    one = height >= rows
    scaled = key * scale
    turned, turned_value = scaled.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
    d_query = torch.empty_like(query)
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in (key, value)] if not one else []
    for row in _blocks(rows, height):
        seen = min(columns, row.stop) if causal else columns  # keys after the last row take no part
        q, g = query[:, row], grad[:, row]
        scores = torch.bmm(q, turned[:, :, :seen])
        if causal:
            scores += _triangle(scores, row.start)
        elif mask is not None:
            scores = _masked(scores.unflatten(0, shape), mask[:, :, _part(mask, 2, row)]).flatten(0, 1)
        maps = scores.softmax(-1)
        if mask is not None:
            maps = maps.nan_to_num_()  # a row that sees nothing; torch's forward gives zeros
        d_value = torch.bmm(maps.transpose(1, 2), g) if needs[2] else value
        d_key = key
        if needs[0] or needs[1]:
            d_maps = torch.bmm(g, turned_value[:, :, :seen])
            d_scores = torch._softmax_backward_data(d_maps, maps, -1, maps.dtype)
            if needs[0]:
                torch.bmm(d_scores, scaled[:, :seen], out=d_query[:, row])
            if needs[1]:
                d_key = torch.bmm(d_scores.transpose(1, 2), q).mul_(scale)
        if one:
            return d_query, d_key, d_value
        for total, share, need in zip(sums, (d_key, d_value), needs[1:3], strict=True):
            if need:
                total[:, :seen] += share
    return d_query, sums[0], sums[1]


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _triangle(scores: Tensor, top: int) -> Tensor:
    """What hides the future from query rows that begin at `top`, (rows, keys)."""
    hidden = torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype, device=scores.device)
    return hidden.triu_(top + 1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _part(mask: Tensor, dim: int, part: slice) -> slice:
    """Of a mask that may be of size 1 in a dimension."""
    return part if mask.shape[dim] > 1 else slice(None)


class fast_attention(TorchFunctionMode):
    """A context in which torch's scaled_dot_product_attention has the backward pass of this file, where that is faster.

    That is on the CPU, in half precision, for inputs (B, H, N, E) some of which want a gradient; without dropout, and
    with a mask that wants none. Everything else is as outside of it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    inputs = (query, key, value)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    takes = (
        query.device.type == "cpu"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in inputs)
        and dropout_p == 0
        and not (attn_mask is not None and (attn_mask.requires_grad or is_causal))
        and all(t.dim() == 4 and t.numel() and t.shape[0] == query.shape[0] for t in inputs)
        and (enable_gqa or key.shape[1] == query.shape[1] == value.shape[1])
        and (not is_causal or query.shape[2] == key.shape[2])
    )
    if not takes:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    with torch.autocast("cpu", enabled=False):
        if key.shape[2] * key.shape[3] < SMALL:
            q, k, v = (t.to(dtype).float() for t in inputs)
            mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            ).to(dtype)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = _Attention.apply(*(t.to(dtype) for t in inputs), attn_mask, is_causal, scale)
        return out
