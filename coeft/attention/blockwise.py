"""coeff_attention by blocks of query rows: exact, without ever holding all maps of a layer.

A block is some query rows of some batch items, of all heads. Its scores, maps and mixed maps live in buffers that are
allocated once a call and sized for the processor's cache; the backward pass computes the maps again, block by block,
from the inputs. So memory grows with the number of tokens, not with its square.

Row log-sum-exps are not kept: the backward takes a fused softmax again instead of one exponential, and needs no memory
for it. Whether keeping them would be faster was not measured.

In half precision the matrix products take and give that type (accumulated in float32); softmax, dropout, mixing and
sums over blocks are float32. So the scores, the mixed maps and their gradients are rounded once each, as in attention
that is not fused, and small coefficients count in full.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Entries of a block's maps over all heads, roughly: 4 MB in float32."""
MIN_ROWS = 128
"""Fewer query rows make slow matrix products: for as many a block may grow to 4 * BLOCK entries."""
FEWEST_ROWS = 16
LOW = (torch.bfloat16, torch.float16)


def blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See coeff_attention, which checks what it passes on. Differentiable once.

    Args:
        query: (B, H, N, E), no size zero.
        key: (B, H_kv, M, E), H_kv divides H.
        value: (B, H_kv, M, D).
        coeff: (H, H), any float type.
        mask: (1 or B, 1 or H, 1 or N, 1 or M), bool or float; it gets no gradient.
    """
    # One draw from torch's generator stands for all dropout masks, so that the backward can repeat them.
    seed = torch.randint(2**62, (), dtype=torch.int64) if dropout_p > 0 else None
    return cast(Tensor, _forward(query, key, value, coeff, mask, seed, dropout_p, is_causal, scale))


@dataclass(slots=True)
class _Block:
    """Query rows of some batch items: b items, R rows, m keys that they may see; KV key heads of G query heads each."""

    items: slice
    rows: slice
    keys: int
    first: bool
    """The first block of these items."""
    last: bool
    sizes: tuple[int, int, int]
    """b, R, m"""
    query: Tensor
    """(b * KV, G * R, E), scaled"""
    key: Tensor
    """(b * KV, m, E)"""
    value: Tensor
    """(b * KV, m, D)"""
    maps: Tensor
    """(b, H, R, m), after the softmax"""
    dropped: Tensor
    """maps after dropout, without its factor 1 / (1 - p), which is part of the coefficients"""
    kept: Tensor | None
    """ones and zeros of the dropout"""


class _Blocks:
    """The blocks of one call, one after the other in the same buffers."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coeff: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.is_causal, self.scale = is_causal, scale
        B, H, N, _ = query.shape
        self.kv_heads, M = key.shape[1], key.shape[2]
        rows = max(BLOCK // (H * M), min(MIN_ROWS, 4 * BLOCK // (H * M)), FEWEST_ROWS)
        if H * N * M <= 2 * BLOCK:
            rows = N
        self.rows = math.ceil(N / math.ceil(N / rows))  # blocks of equal size
        self.items = min(B, max(1, BLOCK // 2 // (H * self.rows * M)))
        self.low = query.dtype in LOW
        self.exact = torch.float32 if self.low else query.dtype
        self.keep = 1 - dropout_p
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(query.device).manual_seed(int(seed))
        factor = 1 / self.keep if self.keep > 0 else 0.0  # everything is dropped at p = 1
        self.coeff = coeff.to(self.exact) * factor
        self.factor = factor
        self.hidden = self.bias = self.empty = None
        if mask is not None:
            shape = (B, H, N, M)
            closed = ~mask if mask.dtype == torch.bool else mask == -math.inf
            empty = closed.all(-1, keepdim=True)
            if empty.any():
                self.empty = empty.expand(B, H, N, 1)
            if mask.dtype == torch.bool:
                self.hidden = closed.expand(shape)
            else:
                self.bias = mask.to(self.exact).expand(shape)
        self._flat: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Contiguous memory, uninitialised; the same for the same name. Of the exact type unless told otherwise."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype or self.exact, device=self.query.device)
        return flat[:size].view(shape)

    def __iter__(self) -> Iterator[_Block]:
        B, H, N, E = self.query.shape
        M = self.value.shape[-2]
        KV = self.kv_heads
        starts = range(0, N, self.rows)
        # long causal rows first, so that the first buffers are the largest
        for b0 in range(0, B, self.items):
            items = slice(b0, min(B, b0 + self.items))
            b = items.stop - b0
            # packed: models hand over slices of a joint projection, which every product would copy or stride through
            key, value = (t[items].contiguous().view(b * KV, M, -1) for t in (self.key, self.value))
            for r0 in reversed(starts):
                rows = slice(r0, min(N, r0 + self.rows))
                R = rows.stop - r0
                m = min(M, rows.stop) if self.is_causal else M
                query = self.buffer("query", b, H, R, E, dtype=self.query.dtype)
                torch.mul(self.query[items, :, rows], self.scale, out=query)
                block = _Block(
                    items=items,
                    rows=rows,
                    keys=m,
                    first=r0 == starts[-1],
                    last=r0 == 0,
                    sizes=(b, R, m),
                    query=query.view(b * KV, -1, E),
                    key=key[:, :m],
                    value=value[:, :m],
                    maps=self.buffer("maps", b, H, R, m),
                    dropped=self.buffer("maps", b, H, R, m),
                    kept=None,
                )
                self._fill(block)
                yield block

    def _fill(self, block: _Block) -> None:
        """Scores, softmax and dropout of a block."""
        maps, m = block.maps, block.keys
        self.between(maps, block.query, block.key.transpose(1, 2))
        where = (block.items, slice(None), block.rows)
        if self.is_causal and m > block.rows.start + 1:
            ahead = slice(block.rows.start, m)  # keys before are seen by every row of the block
            closed = torch.ones(maps.shape[2], m - block.rows.start, dtype=torch.bool, device=maps.device).triu_(1)
            maps[..., ahead].masked_fill_(closed, -math.inf)
        if self.hidden is not None:
            maps.masked_fill_(self.hidden[where], -math.inf)
        if self.bias is not None:
            maps.add_(self.bias[where])
        torch.softmax(maps, -1, out=maps)
        if self.empty is not None:
            maps.masked_fill_(self.empty[where], 0)
        if self.generator is not None:
            block.kept = self.buffer("kept", *maps.shape).bernoulli_(self.keep, generator=self.generator)
            block.dropped = torch.mul(maps, block.kept, out=self.buffer("dropped", *maps.shape))

    def by_group(self, maps: Tensor) -> Tensor:
        """(b, H, R, ...) contiguous -> (b * KV, G * R, ...): what shares a key head as the rows of one matrix."""
        return maps.view(maps.shape[0] * self.kv_heads, -1, maps.shape[-1])

    def mix(self, maps: Tensor, name: str, *, transpose: bool = False) -> Tensor:
        """sum_h coeff[g, h] maps_h, or with `transpose` sum_g coeff[g, h] maps_g, in the buffer `name`."""
        out = self.buffer(name, *maps.shape)
        b, H = maps.shape[:2]
        coeff = (self.coeff.T if transpose else self.coeff).expand(b, H, H)
        torch.bmm(coeff, maps.view(b, H, -1), out=out.view(b, H, -1))
        return out

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, batches of matrices, in the buffer `name` and the type of the inputs."""
        out = self.buffer(name, left.shape[0], left.shape[1], right.shape[2], dtype=self.query.dtype)
        return torch.bmm(left, right, out=out)

    def between(self, maps: Tensor, left: Tensor, right: Tensor) -> None:
        """left @ right, grouped, into `maps`, (b, H, R, m) in the exact type."""
        if self.low:
            self.by_group(maps).copy_(self.product("narrow", left, right))
        else:
            torch.bmm(left, right, out=self.by_group(maps))

    def narrow(self, maps: Tensor) -> Tensor:
        """(b, H, R, m), grouped and in the type of the inputs, for a product: valid until the next one is asked for."""
        grouped = self.by_group(maps)
        if not self.low:
            return grouped
        return self.buffer("narrow", *grouped.shape, dtype=self.query.dtype).copy_(grouped)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """<left_g, right_h> for all pairs of heads of (b, H, R, m), summed over items: (H, H)."""
        b, H, _, _ = left.shape
        if b == 1:  # row by row: twice as fast as one product over all rows
            return torch.bmm(left[0].transpose(0, 1), right[0].permute(1, 2, 0)).sum(0)
        return torch.bmm(left.view(b, H, -1), right.view(b, H, -1).transpose(1, 2)).sum(0)

    def accumulate(self, target: Tensor, name: str, block: _Block, left: Tensor, right: Tensor) -> None:
        """Add left^T @ right to the gradient of the items' keys or values; write it to `target` with the last block."""
        sums = self.buffer(name, left.shape[0], target.shape[2], right.shape[2])
        part = sums[:, : block.keys]
        if block.first:  # it has all the keys that any block has
            sums[:, block.keys :].zero_()
        if not self.low:
            torch.baddbmm(part, left.transpose(1, 2), right, beta=0 if block.first else 1, out=part)
        elif block.first:
            part.copy_(self.product("product", left.transpose(1, 2), right))
        else:
            product = self.product("product", left.transpose(1, 2), right)
            part.add_(self.buffer("wide", *product.shape).copy_(product))  # add_ alone would allocate that each time
        if block.last:
            target[block.items].copy_(sums.view(target[block.items].shape))


# One opaque operator for the forward and one for the backward: torch.compile takes them as they are.


@torch.library.custom_op("coeft::blockwise_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    out = _output(query, value)
    with torch.autocast(query.device.type, enabled=False):
        blocks = _Blocks(query, key, value, coeff, mask, seed, dropout_p, is_causal, scale)
        for block in blocks:
            mixed = blocks.mix(block.dropped, "mixed")
            product = blocks.product("out", blocks.narrow(mixed), block.value)
            out[block.items, :, block.rows] = product.view(block.sizes[0], -1, block.sizes[1], value.shape[-1])
    return out


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    return _output(query, value)


def _output(query: Tensor, value: Tensor) -> Tensor:
    """(B, H, N, D) with the memory of (B, N, H, D), since models join the heads next."""
    B, H, N, _ = query.shape
    return query.new_empty((B, N, H, value.shape[-1])).transpose(1, 2)


@torch.library.custom_op("coeft::blockwise_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and coeff; an empty tensor where `needs` says no.

    With A_h the maps and D_g = G_g v_g^T:

        d coeff_gh = <D_g, A_h>     d v_g = (sum_h coeff_gh A_h)^T G_g     d A_h = sum_g coeff_gh D_g
    """
    dq, dk, dv, dcoeff = _gradients(query, key, value, coeff, needs)
    need_q, need_k, need_v, need_coeff = needs
    with torch.autocast(query.device.type, enabled=False):
        blocks = _Blocks(query, key, value, coeff, mask, seed, dropout_p, is_causal, scale)
        total = torch.zeros(coeff.shape, dtype=blocks.exact, device=coeff.device)
        for block in blocks:
            b, R, _ = block.sizes
            upstream = blocks.by_group(grad[block.items, :, block.rows].contiguous())
            if need_v:
                mixed = blocks.mix(block.dropped, "mixed")
                blocks.accumulate(dv, "dv", block, blocks.narrow(mixed), upstream)
            if not (need_q or need_k or need_coeff):
                continue
            slope = blocks.buffer("slope", *block.maps.shape)
            blocks.between(slope, upstream, block.value.transpose(1, 2))  # D
            if need_coeff:
                total += blocks.inner(slope, block.dropped)
            if not (need_q or need_k):
                continue
            slope = blocks.mix(slope, "mixed", transpose=True)
            if block.kept is not None:
                slope.mul_(block.kept)
            softmax_backward(slope, block.maps, -1, slope.dtype, grad_input=slope)
            scores = blocks.narrow(slope)
            if need_q:
                product = blocks.product("dq", scores, block.key)
                torch.mul(product.view(b, -1, R, query.shape[-1]), scale, out=dq[block.items, :, block.rows])
            if need_k:
                blocks.accumulate(dk, "dk", block, scores, block.query)
        if need_coeff:
            dcoeff.copy_(total.mul_(blocks.factor))
    return dq, dk, dv, dcoeff


softmax_backward: Any = torch.ops.aten._softmax_backward_data.out


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(query, key, value, coeff, needs)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dcoeff = (
        t.new_empty(t.shape if need else 0) for t, need in zip((query, key, value, coeff), needs, strict=True)
    )
    return dq, dk, dv, dcoeff


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    given = _backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(given, needs, strict=True)), *[None] * 5)


_forward.register_autograd(_derive, setup_context=_save)
