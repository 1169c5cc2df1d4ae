"""The backward pass of attention in half precision on the CPU, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coeft.attention import half
from coeft.attention.half import fast_attention

BF16 = torch.bfloat16


def inputs(B: int, H: int, N: int, E: int, *, M: int | None = None, kv: int | None = None) -> tuple[Tensor, ...]:
    """Query, key, value and a gradient, in bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, N, E), (B, kv or H, M or N, E), (B, kv or H, M or N, E), (B, H, N, E)
    return tuple(torch.randn(shape, generator=generator).to(BF16) for shape in shapes)


def gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    """Output and the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = F.scaled_dot_product_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(tensors: tuple[Tensor, ...], **options: Any) -> None:
    """Outputs as torch's own, to the bit; gradients as those of float64 to the rounding of bf16."""
    exact = {k: v.double() if isinstance(v, Tensor) and v.dtype == BF16 else v for k, v in options.items()}
    wanted = gradients(*(t.double() for t in tensors), **exact)
    with fast_attention():
        found = gradients(*tensors, **options)
    assert torch.equal(found[0], gradients(*tensors, **options)[0])
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert ours.dtype == BF16 and ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() < 0.012 * theirs.norm()


SHAPES = {
    "square": {"B": 3, "H": 4, "N": 70, "E": 32},
    "cross": {"B": 2, "H": 2, "N": 40, "E": 64, "M": 90},
    "grouped": {"B": 2, "H": 6, "N": 70, "E": 32, "kv": 2},
}


@pytest.mark.parametrize("entries", [1 << 22, 30_000, 3_000])  # everything at once, blocks of heads, of rows
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64(shape: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "ENTRIES", entries)
    monkeypatch.setattr(half, "MIN_ROWS", 16)
    tensors, grouped = inputs(**SHAPES[shape]), {"enable_gqa": True} if shape == "grouped" else {}
    check(tensors, **grouped)
    check(tensors, scale=0.3, **grouped)
    if shape != "cross":
        check(tensors, is_causal=True, **grouped)
    items, heads, rows, _ = tensors[0].shape
    columns = tensors[1].shape[2]
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(items, 1, rows, columns, generator=generator) > 0.3
    seen[..., 0] = True
    check(tensors, attn_mask=seen, **grouped)
    check(tensors, attn_mask=seen[0, 0], **grouped)
    check(tensors, attn_mask=seen[:, :, :1], **grouped)
    check(tensors, attn_mask=torch.randn(1, heads, rows, columns, generator=generator).to(BF16), **grouped)


def test_a_row_that_sees_nothing_gives_no_nan() -> None:
    tensors = inputs(2, 2, 70, 32)
    seen = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    seen[0, 0, 3] = False
    with fast_attention():
        for each in gradients(*tensors, attn_mask=seen):
            assert each.isfinite().all()


def test_only_what_is_needed_is_computed() -> None:
    query, key, value, grad = inputs(2, 2, 70, 32)
    with fast_attention():
        wanted = gradients(query, key, value, grad)
        for place, tensor in enumerate((query, key, value)):
            leaves = [query, key, value]
            leaves[place] = tensor.detach().requires_grad_()
            out = F.scaled_dot_product_attention(*leaves)
            assert torch.equal(torch.autograd.grad(out, leaves[place], grad)[0], wanted[place + 1])


def test_small_heads_take_the_kernel_of_float32() -> None:
    query, key, value, grad = inputs(4, 2, 17, 16)
    wanted = gradients(query.float(), key.float(), value.float(), grad.float())
    with fast_attention():
        found = gradients(query, key, value, grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs.to(BF16))
    bias = torch.randn(2, 17, 17, generator=torch.Generator().manual_seed(1))
    with fast_attention(), torch.autocast("cpu", BF16):
        found = gradients(query, key, value, grad, attn_mask=bias)
    wanted = gradients(query.double(), key.double(), value.double(), grad.double(), attn_mask=bias.double())
    for ours, wants in zip(found, wanted, strict=True):
        assert (ours.double() - wants).norm() < 0.01 * wants.norm()


def test_under_autocast_inputs_in_float32_are_taken_in_half_precision() -> None:
    query, key, value, grad = inputs(2, 2, 70, 32)
    with fast_attention():
        wanted = gradients(query, key, value, grad)
        with torch.autocast("cpu", BF16):
            found = gradients(query.float(), key.float(), value.float(), grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.to(BF16), theirs)


def test_everything_else_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half._Attention, "apply", lambda *args: pytest.fail("taken"))
    query, key, value, grad = inputs(2, 2, 70, 32)
    with fast_attention():
        F.scaled_dot_product_attention(query, key, value)  # nothing wants a gradient
        with torch.no_grad():
            F.scaled_dot_product_attention(query.requires_grad_(), key, value)
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        F.scaled_dot_product_attention(query[0], key[0], value[0])
        F.scaled_dot_product_attention(query, key, value, torch.zeros(70, 70, dtype=BF16, requires_grad=True))


@pytest.mark.slow
def test_it_can_be_compiled() -> None:
    tensors = inputs(2, 2, 70, 32)
    with fast_attention():
        wanted = gradients(*tensors)
        compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager")
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        out = compiled(*leaves)
    for ours, theirs in zip((out, *torch.autograd.grad(out, leaves, tensors[3])), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
