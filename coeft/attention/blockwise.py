"""coeff_attention by blocks of query rows: exact, without ever holding all maps of a layer.

A block is some query rows of some batch items, of all heads. Its maps, and what is computed from them, lie in three
buffers that all blocks share and that the next call finds again. The backward pass computes the maps again, block by
block, from the inputs. So memory grows with the number of tokens, not with its square. Keys and values are laid out
once a call as the matrix products read them fastest.

Row log-sum-exps are not kept. With them the backward would subtract and exponentiate, two passes over a block (0.75 ns
an entry, measured on one core with AVX-512) in the place of one fused softmax (1.05 ns), but the forward would need
the maximum of each row twice more (0.4 ns).

In half precision the matrix products take and give that type (accumulated in float32); softmax, dropout, mixing and
sums over blocks are float32. So the scores, the mixed maps and their gradients are rounded once each, as in attention
that is not fused, and small coefficients count in full.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = {False: 1 << 19, True: 1 << 20}
"""Entries of a block's maps over all heads, roughly, by whether the inputs are of half precision, where every block
costs a conversion of what it adds to the gradients of all keys: 2 or 4 MB."""
MIN_ROWS = {False: 96, True: 128}
"""Fewer query rows make slow matrix products: for as many a block may grow to LARGEST."""
LARGEST = 3 << 20
"""Entries of a block."""
SEVERAL = 1 << 19
"""Entries that several small items may have together in a block."""
FEWEST_ROWS = 16
PACKED = 1 << 22
"""Entries up to which keys are laid out in both ways, for the scores and for the gradient of the queries."""
SPARE = 1 << 26
"""Bytes of buffers that are kept from one call to the next on a CPU, which would have to map their memory each time."""
DRAWS = 1 << 16
"""Different random numbers of a dropout, whose probability is rounded to a multiple of 1 / DRAWS."""
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
    """R query rows of b batch items, and the m keys that they may see; KV key heads of G query heads each."""

    items: slice
    rows: slice
    keys: int
    """m"""
    first: bool
    """The first block of these items."""
    last: bool
    query: Tensor
    """(b * KV, G * R, E)"""
    maps: Tensor
    """(b, H, R, m), after the softmax"""
    dropped: Tensor
    """maps after dropout, without its factor 1 / (1 - p), which is part of the coefficients"""
    kept: Tensor | None
    """ones and zeros of the dropout"""


class _Buffers:
    """Memory by name, allocated once and used again for every block."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Contiguous and uninitialised. A name always has one type: that of all buffers unless told otherwise."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            self._flat.pop(name, None)
            with torch.inference_mode(False):  # a later call may be outside of it
                flat = self._flat[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return flat[:size].view(shape)

    def bytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())


_spare: dict[tuple[torch.dtype, torch.device], _Buffers] = {}


@contextmanager
def _buffers(inputs: torch.dtype, exact: torch.dtype, device: torch.device) -> Iterator[_Buffers]:
    """Those of the last call of the same types, unless another thread has them."""
    buffers = _spare.pop((inputs, device), None) or _Buffers(exact, device)
    yield buffers  # lost if the call fails
    if device.type == "cpu" and buffers.bytes() <= SPARE:
        _spare[inputs, device] = buffers


class _Packed:
    """The keys or values of some batch items, (b * KV, M, E), laid out for products as they are asked for."""

    def __init__(self, tensor: Tensor, name: str, buffers: _Buffers, transpose: bool) -> None:
        b, heads, M, E = tensor.shape
        self.tensor, self.name, self.buffers, self.transpose = tensor, name, buffers, transpose
        self.shape = (b * heads, M, E)
        self._rows: Tensor | None = tensor[0] if b == 1 and not transpose else None
        self._columns: Tensor | None = None

    def rows(self, count: int) -> Tensor:
        """(b * KV, count, E): the first tokens, as rows."""
        if self._rows is None:
            if self._columns is not None and self.tensor.numel() > PACKED:
                self._rows = self._columns.transpose(1, 2)  # slower, but long inputs are not held a third time
            else:
                packed = self.buffers(f"{self.name} rows", *self.tensor.shape, dtype=self.tensor.dtype)
                self._rows = packed.copy_(self.tensor).view(self.shape)
        return self._rows[:, :count]

    def columns(self, count: int) -> Tensor:
        """(b * KV, E, count): the first tokens, as columns."""
        if self._columns is None:
            if self.transpose:
                b, heads, M, E = self.tensor.shape
                packed = self.buffers(f"{self.name} columns", b, heads, E, M, dtype=self.tensor.dtype)
                self._columns = packed.copy_(self.tensor.transpose(2, 3)).view(b * heads, E, M)
            else:
                self._columns = self.rows(self.shape[1]).transpose(1, 2)
        return self._columns[:, :, :count]


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
        *,
        buffer: _Buffers,
    ) -> None:
        self.query, self.is_causal, self.scale, self.buffer = query, is_causal, scale, buffer
        self.inputs = {"key": key, "value": value}
        B, H, N, _ = query.shape
        self.kv_heads, M = key.shape[1], key.shape[2]
        self.low = query.dtype in LOW
        self.row_count, self.item_count = _sizes(B, H, N, M, self.low)
        self.exact = buffer.dtype
        self.keep = round((1 - dropout_p) * DRAWS)
        self.factor = DRAWS / self.keep if self.keep else 0.0  # everything is dropped at p = 1
        self.coeff = coeff.to(self.exact) * self.factor
        self._ahead: Tensor | None = None
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(query.device).manual_seed(int(seed))
        self.open = self.bias = self.empty = None
        if mask is not None:
            shape = (B, H, N, M)
            closed = ~mask if mask.dtype == torch.bool else mask == -math.inf
            empty = closed.all(-1, keepdim=True)
            if empty.any():
                self.empty = empty.expand(B, H, N, 1)
            if mask.dtype == torch.bool:
                self.open = mask
            else:
                self.bias = mask.to(self.exact).expand(shape)

    def __iter__(self) -> Iterator[_Block]:
        B, H, N, E = self.query.shape
        M = self.inputs["key"].shape[2]
        starts = range(0, N, self.row_count)
        for i0 in range(0, B, self.item_count):
            items = slice(i0, min(B, i0 + self.item_count))
            b = items.stop - i0
            self.key, self.value = (  # one product alone does not repay a transposition
                _Packed(tensor[items], name, self.buffer, transpose=len(starts) > 1)
                for name, tensor in self.inputs.items()
            )
            for r0 in reversed(starts):  # long causal rows first, so that the first buffers are the largest
                rows = slice(r0, min(N, r0 + self.row_count))
                R = rows.stop - r0
                m = min(M, rows.stop) if self.is_causal else M
                query = self.rows_of("query", self.query, items, rows)
                maps = self.buffer("maps", b, H, R, m)
                first, last = r0 == starts[-1], r0 == 0
                block = _Block(items, rows, m, first, last, query, maps, maps, None)
                self._fill(block)
                yield block

    def _fill(self, block: _Block) -> None:
        """Scores, softmax and dropout of a block."""
        maps, m = block.maps, block.keys
        self.product_into(maps, block.query, self.key.columns(m), self.scale)
        where = (block.items, slice(None), block.rows)
        if self.is_causal and m > block.rows.start + 1:
            ahead = maps[..., block.rows.start :]  # keys before are seen by every row of the block
            torch.minimum(ahead, self._triangle(*ahead.shape[2:]), out=ahead)
        if self.open is not None:
            part = self.open[
                tuple(s if size > 1 else slice(None) for s, size in zip(where, self.open.shape, strict=False))
            ]
            torch.minimum(maps, self._ceiling(part), out=maps)
        if self.bias is not None:
            maps.add_(self.bias[where])
        torch.softmax(maps, -1, out=maps)
        if self.empty is not None:
            maps.masked_fill_(self.empty[where], 0)
        if self.generator is not None:
            block.kept = self._draw(maps, self.generator)
            block.dropped = torch.mul(maps, block.kept, out=self.buffer("dropped", *maps.shape))

    def _draw(self, maps: Tensor, generator: torch.Generator) -> Tensor:
        """Ones and zeros of the dropout: four entries a draw of 64 bits, a fifth of the time of bernoulli_ on a CPU."""
        size = maps.numel()
        bits = self.buffer("bits", -(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        numbers = bits.view(torch.int16)[:size].view(maps.shape)
        return torch.le(numbers, max(self.keep, 1) - DRAWS // 2 - 1, out=self.buffer("kept", *maps.shape))

    # Where keys are hidden a minimum takes the place of a fill, which is five times as slow on a CPU.

    def _ceiling(self, open_: Tensor) -> Tensor:
        """Infinity where a mask is true, minus infinity elsewhere."""
        return torch.where(open_, math.inf, torch.tensor(-math.inf, dtype=self.exact, device=open_.device))

    def _triangle(self, rows: int, columns: int) -> Tensor:
        """The ceiling of a causal block, made once for blocks of one size."""
        if self._ahead is None or self._ahead.shape != (rows, columns):
            seen = torch.ones(rows, columns, dtype=torch.bool, device=self.query.device).tril_()
            self._ahead = self._ceiling(seen)
        return self._ahead

    # Products with a block's maps. Heads that share a key head are the rows of one matrix.

    def grouped(self, maps: Tensor) -> Tensor:
        """(b, H, R, ...) contiguous -> (b * KV, G * R, ...)."""
        return maps.view(maps.shape[0] * self.kv_heads, -1, maps.shape[-1])

    def rows_of(self, name: str, tensor: Tensor, items: slice, rows: slice) -> Tensor:
        """A block's rows of a (B, H, N, E): (b * KV, G * R, E), as they lie where one matrix a head allows it."""
        part = tensor[items, :, rows]
        if part.shape[:2] == (1, self.kv_heads) and part.stride(-1) == 1:
            return part[0]
        return self.grouped(self.buffer(name, *part.shape, dtype=part.dtype).copy_(part))

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, batches of matrices, in the buffer `name` and the type of the inputs."""
        out = self.buffer(name, left.shape[0], left.shape[1], right.shape[2], dtype=self.query.dtype)
        return torch.bmm(left, right, out=out)

    def product_into(self, maps: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
        """factor * left @ right, grouped, into `maps`, (b, H, R, m) in the exact type."""
        out = self.grouped(maps)
        target = self.buffer("narrow", *out.shape, dtype=self.query.dtype) if self.low else out
        torch.baddbmm(target, left, right, beta=0, alpha=factor, out=target)
        if self.low:
            out.copy_(target)
        return maps

    def narrow(self, maps: Tensor) -> Tensor:
        """(b, H, R, m), grouped and in the type of the inputs, for a product: valid until the next one is asked for."""
        grouped = self.grouped(maps)
        if not self.low:
            return grouped
        return self.buffer("narrow", *grouped.shape, dtype=self.query.dtype).copy_(grouped)

    def mix(self, coeff: Tensor, maps: Tensor, name: str) -> Tensor:
        """sum_h coeff[g, h] maps_h of (b, H, R, m), in the buffer `name`."""
        out = self.buffer(name, *maps.shape)
        b, H = maps.shape[:2]
        torch.bmm(coeff.expand(b, H, H), maps.view(b, H, -1), out=out.view(b, H, -1))
        return out

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """<left_g, right_h> for all pairs of heads of (b, H, R, m), summed over items: (H, H)."""
        b, H, _, _ = left.shape
        if b == 1:  # row by row: twice as fast as one product over all rows
            return torch.bmm(left[0].transpose(0, 1), right[0].permute(1, 2, 0)).sum(0)
        return torch.bmm(left.view(b, H, -1), right.view(b, H, -1).transpose(1, 2)).sum(0)


@dataclass(slots=True)
class _Sum:
    """The gradient of keys or values, which every block adds to; in half precision summed in float32."""

    source: Tensor
    """(B, KV, M, E)"""
    blocks: _Blocks
    name: str
    _result: Tensor | None = field(default=None, init=False)

    def add(self, block: _Block, left: Tensor, right: Tensor) -> None:
        """Add left^T @ right to the gradient of the block's keys."""
        items = self.source[block.items]
        shape = (items.shape[0] * items.shape[1], *items.shape[2:])
        low = self.blocks.low
        total = self.blocks.buffer(self.name, *shape) if low else self.result[block.items].view(shape)
        part = total[:, : block.keys]
        if block.first:  # it has all the keys that any block has
            total[:, block.keys :].zero_()
        if not low:
            torch.baddbmm(part, left.transpose(1, 2), right, beta=0 if block.first else 1, out=part)
            return
        product = self.blocks.product("product", left.transpose(1, 2), right)
        if block.first:
            part.copy_(product)
        else:  # by way of a buffer: add_ alone would allocate one each time
            part.add_(self.blocks.buffer("wide", *product.shape).copy_(product))
        if block.last:
            self.result[block.items].copy_(total.view(items.shape))

    @property
    def result(self) -> Tensor:
        """In the type of the inputs; allocated when it is first written to."""
        if self._result is None:
            self._result = self.source.new_empty(self.source.shape)
        return self._result


def _sizes(B: int, H: int, N: int, M: int, low: bool) -> tuple[int, int]:
    """Rows and items of a block."""
    rows = max(BLOCK[low] // (H * M), min(MIN_ROWS[low], LARGEST // (H * M)), FEWEST_ROWS)
    rows = math.ceil(N / math.ceil(N / rows))  # blocks of equal size
    return rows, min(B, max(1, SEVERAL // (H * rows * M)))


# One opaque operator for the forward and one for the backward: torch.compile takes them as they are.

INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor coeff, Tensor? mask, Tensor? seed, "
    "float dropout_p, bool is_causal, float scale"
)
TENSORS = 6
"""How many of INPUTS are tensors."""


@contextmanager
def _blocks(*inputs: Any) -> Iterator[_Blocks]:
    """The blocks of a call, as autocast leaves them alone."""
    query = inputs[0]
    exact = torch.float32 if query.dtype in LOW else query.dtype
    with torch.autocast(query.device.type, enabled=False), _buffers(query.dtype, exact, query.device) as buffer:
        yield _Blocks(*inputs, buffer=buffer)


def _attend(*inputs: Any) -> Tensor:
    out = _output(*inputs)
    with _blocks(*inputs) as blocks:
        for block in blocks:
            mixed = blocks.mix(blocks.coeff, block.dropped, "mixed")
            product = blocks.product("out", blocks.narrow(mixed), blocks.value.rows(block.keys))
            rows = out[block.items, :, block.rows]
            rows.copy_(product.view(rows.shape))
    return out


def _output(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """(B, H, N, D) with the memory of (B, N, H, D), since models join the heads next."""
    B, H, N, _ = query.shape
    return query.new_empty((B, N, H, value.shape[-1])).transpose(1, 2)


def _gradients(needs: list[bool], grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and coeff; an empty tensor where `needs` says no.

    With A_h the maps, after dropout, and D_g = G_g v_g^T:

        d coeff_gh = <D_g, A_h>     d v_g = (sum_h coeff_gh A_h)^T G_g     d A_h = sum_g coeff_gh D_g
    """
    query, key, value, coeff, *_ = inputs
    need_query, need_key, need_value, need_coeff = needs
    with _blocks(*inputs) as blocks:
        dq = query.new_empty(query.shape if need_query else 0)
        dk, dv = _Sum(key, blocks, "dk"), _Sum(value, blocks, "dv")
        dcoeff = torch.zeros(coeff.shape, dtype=blocks.exact, device=coeff.device)
        back = blocks.coeff.T * blocks.scale  # the scale of the scores belongs to the gradients of queries and keys
        for block in blocks:
            upstream = blocks.rows_of("grad", grad, block.items, block.rows)
            if need_value:
                dv.add(block, blocks.narrow(blocks.mix(blocks.coeff, block.dropped, "mixed")), upstream)
            if not (need_query or need_key or need_coeff):
                continue
            slope = blocks.buffer("mixed", *block.maps.shape)
            blocks.product_into(slope, upstream, blocks.value.columns(block.keys))  # D
            if need_coeff:
                dcoeff += blocks.inner(slope, block.dropped)
            if not (need_query or need_key):
                continue
            slope = blocks.mix(back, slope, "slope")
            if block.kept is not None:
                slope.mul_(block.kept)
            softmax_backward(slope, block.maps, -1, slope.dtype, grad_input=slope)
            scores = blocks.narrow(slope)
            if need_query:
                rows = dq[block.items, :, block.rows]
                if rows.is_contiguous():
                    torch.bmm(scores, blocks.key.rows(block.keys), out=blocks.grouped(rows))
                else:
                    rows.copy_(blocks.product("dq", scores, blocks.key.rows(block.keys)).view(rows.shape))
            if need_key:
                dk.add(block, scores, block.query)
    empty = query.new_empty(0), query.new_empty(0), coeff.new_empty(0)
    return (
        dq,
        dk.result if need_key else empty[0],
        dv.result if need_value else empty[1],
        (dcoeff * blocks.factor).to(coeff.dtype) if need_coeff else empty[2],
    )


softmax_backward: Any = torch.ops.aten._softmax_backward_data.out


def _fake_gradients(needs: list[bool], grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=False))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    given = _backward(needs, grad, *ctx.saved_tensors, *ctx.options)
    return (*(g if need else None for g, need in zip(given, needs, strict=True)), *[None] * 5)


_forward = torch.library.custom_op(
    "coeft::blockwise_attention", _attend, mutates_args=(), schema=f"({INPUTS}) -> Tensor"
)
_forward.register_fake(_output)
_forward.register_autograd(_derive, setup_context=_save)
_backward = torch.library.custom_op(
    "coeft::blockwise_attention_backward",
    _gradients,
    mutates_args=(),
    schema=f"(bool[] needs, Tensor grad, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward.register_fake(_fake_gradients)
