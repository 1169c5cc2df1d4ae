"""The blockwise form of coeff_attention against the reference form."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coeft.attention import blockwise
from coeft.attention.functional import coeff_attention, prefers_blocks


@pytest.fixture(autouse=True, params=[(1 << 20, 128), (60, 2)], ids=["one block", "many blocks"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    block, rows = request.param
    monkeypatch.setattr(blockwise, "BLOCK", dict.fromkeys((False, True), block))
    monkeypatch.setattr(blockwise, "MIN_ROWS", dict.fromkeys((False, True), rows))
    monkeypatch.setattr(blockwise, "SEVERAL", block // 2)
    if rows == 2:
        monkeypatch.setattr(blockwise, "FEWEST_ROWS", 2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(B: int, H: int, KV: int, N: int, M: int, E: int = 5, D: int = 3, seed: int = 0) -> list[Tensor]:
    shapes = ((B, H, N, E), (B, KV, M, E), (B, KV, M, D), (H, H))
    return [draw(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]


def compare(given: list[Tensor], **options: object) -> None:
    outs = [coeff_attention(*given, implementation=i, **options) for i in ("reference", "blockwise")]
    target = draw(*outs[0].shape, seed=9)
    grads = [torch.autograd.grad((out * target).sum(), given) for out in outs]
    for one, two in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)


def with_known_dropout(given: list[Tensor], p: float, **options: Any) -> tuple[Tensor, Tensor]:
    """What blockwise gives under dropout, and the formula with the entries that it kept.

    Values that are an identity matrix show them: the same seed keeps the same entries whatever the values are.
    """
    q, k, v, coeff = given
    H, M = q.shape[1], k.shape[2]
    eye = torch.eye(M, dtype=q.dtype).expand(*k.shape[:2], M, M)

    def maps(implementation: str, dropout_p: float) -> Tensor:
        torch.manual_seed(3)
        identity = torch.eye(H, dtype=q.dtype)
        return coeff_attention(q, k, eye, identity, dropout_p=dropout_p, implementation=implementation, **options)

    dropped = maps("reference", 0.0) * (maps("blockwise", p) != 0) / (1 - p)
    torch.manual_seed(3)
    out = coeff_attention(q, k, v, coeff, dropout_p=p, implementation="blockwise", **options)
    values = v.repeat_interleave(H // v.shape[1], 1)
    return out, torch.einsum("gh,bhnm,bgmd->bgnd", coeff, dropped, values)


def joint(B: int, H: int, KV: int, N: int, M: int, seed: int, E: int = 5) -> list[Tensor]:
    """Inputs as models hand them over: key and value are slices of one projection, the query's heads not its rows."""
    q = draw(B, N, H, E, seed=seed).transpose(1, 2)
    k, v = draw(B, M, 2 * KV, E, seed=seed + 1).transpose(1, 2).split((KV, KV), 1)
    return [t.detach().requires_grad_() for t in (q, k, v, draw(H, H, seed=seed + 2))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    groups=st.integers(1, 3),
    KV=st.integers(1, 3),
    N=st.integers(1, 13),
    M=st.integers(1, 13),
    mask=st.sampled_from(["none", "causal", "bool", "float", "padding"]),
    dropout=st.sampled_from([0.0, 0.0, 0.375]),  # a multiple of 1 / DRAWS
    slices=st.booleans(),
    wanted=st.sets(st.integers(0, 3), min_size=1),
    seed=st.integers(0, 99),
)
def test_it_is_the_reference(
    B: int,
    groups: int,
    KV: int,
    N: int,
    M: int,
    mask: str,
    dropout: float,
    slices: bool,
    wanted: set[int],
    seed: int,
) -> None:
    """Outputs and whichever gradients are asked for, over shapes, masks, grouped queries, layouts and dropout."""
    H = groups * KV
    random = draw(B, H, N, M, seed=seed + 50)
    options: dict = (
        {"enable_gqa": True, "scale": 0.4}
        | {
            "none": {},
            "causal": {"is_causal": True},
            "bool": {"attn_mask": random[:1] < 0.5},  # some rows without any key
            "float": {"attn_mask": random[:, :1].masked_fill(random[:, :1] > 1, -torch.inf)},
            "padding": {"attn_mask": random[:, :1, :1] < 0.5},
        }[mask]
    )
    given = joint(B, H, KV, N, M, seed) if slices else inputs(B, H, KV, N, M, seed=seed)
    asked = [t.requires_grad_(i in wanted) for i, t in enumerate(given)]
    asked = [t for t in asked if t.requires_grad]
    if dropout:
        got, expected = with_known_dropout(given, dropout, **options)
    else:
        got, expected = (coeff_attention(*given, implementation=i, **options) for i in ("blockwise", "reference"))
    target = draw(*expected.shape, seed=9)
    ours, theirs = (torch.autograd.grad((out * target).sum(), asked) for out in (got, expected))
    for one, two in zip((got, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["joint", "heads first", "transposed", "expanded"])
def test_every_layout_of_the_inputs_gives_the_same(layout: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(heads: int) -> Tensor:
        shapes = {
            "joint": lambda: torch.randn(2, 7, 3 * heads, 4, generator=generator)[:, :, ::3].transpose(1, 2),
            "heads first": lambda: torch.randn(2, heads, 7, 4, generator=generator),
            "transposed": lambda: torch.randn(2, heads, 4, 7, generator=generator).transpose(2, 3),
            "expanded": lambda: torch.randn(2, 1, 7, 4, generator=generator).expand(2, heads, 7, 4),
        }
        return shapes[layout]().double().requires_grad_()

    given = made(4), made(4 // groups), made(4 // groups), torch.randn(4, 4, generator=generator).double()
    results = []
    for implementation in ("reference", "blockwise"):
        out = coeff_attention(*given, enable_gqa=True, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), given[:3])))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_no_tensor_holds_all_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", {False: 256})
    given = inputs(1, 4, 2, 96, 96)
    for implementation, least, most in (("reference", 4 * 96 * 96, 4 * 96 * 96), ("blockwise", 0, 4 * 16 * 96)):
        with Largest() as largest:
            out = coeff_attention(*given, enable_gqa=True, implementation=implementation)
            torch.autograd.grad(out.sum(), given)
        assert least <= largest.entries <= most


def test_calls_in_other_threads_and_without_gradients_leave_no_trace() -> None:
    """Buffers outlive a call; another thread has its own, and inference mode leaves ones that training can use."""
    many = [[t.detach() for t in inputs(2, 3, 3, 9 + i, 7 + i, seed=i)] for i in range(4)]
    expected = [coeff_attention(*given, implementation="reference") for given in many]

    def call(given: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return coeff_attention(*given, implementation="blockwise")

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(call, many), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    compare([t.requires_grad_() for t in many[0]])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": draw(5, 4, seed=8) < 0.7}])
def test_gradcheck(options: dict) -> None:
    given = inputs(2, 2, 1, 5, 4, 3, 2)
    call = lambda *t: coeff_attention(*t, enable_gqa=True, implementation="blockwise", **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, given)


def test_dropout_is_the_same_in_the_backward() -> None:
    """Finite differences hold when every call draws the same; a linear function of the values shows which maps."""
    given = inputs(1, 2, 2, 5, 4, 2, 2)

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return coeff_attention(*tensors, dropout_p=0.4, implementation="blockwise")

    assert torch.autograd.gradcheck(call, given)
    assert torch.equal(call(*given), call(*given))
    assert not torch.equal(call(*given), coeff_attention(*given, dropout_p=0.4, implementation="blockwise"))
    many = [t.detach() for t in inputs(1, 2, 2, 4, 6)]
    draws = [t.expand(2000, *t.shape[1:]) for t in many[:3]]
    mean = coeff_attention(*draws, many[3], dropout_p=0.3, implementation="blockwise").mean(0, keepdim=True)
    torch.testing.assert_close(mean, coeff_attention(*many, implementation="reference"), atol=0.25, rtol=0)
    assert (coeff_attention(*many, dropout_p=1.0, implementation="blockwise") == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_entry_is_dropped_as_often(p: float) -> None:
    """Also each of the four that one draw decides, and no two of them together; within five standard errors."""
    torch.manual_seed(0)
    n, size = 2000, 8  # values that are an identity matrix show the maps
    q = torch.zeros(n, 1, 2, 4)
    eye = torch.eye(size).expand(n, 1, size, size)
    zeros = torch.zeros(n, 1, size, 4)
    maps = coeff_attention(q, zeros, eye, torch.eye(1), dropout_p=p, implementation="blockwise")
    kept = (maps != 0).double().flatten(1)
    assert kept.unique().numel() == 2
    spread = (p * (1 - p)) ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * spread / n**0.5
    together = (kept - (1 - p)).T @ (kept - (1 - p)) / n
    assert (together - torch.diag(together.diag())).abs().max() < 5 * spread**2 / n**0.5
    assert (maps[maps != 0] * size * (1 - p) - 1).abs().max() < 1e-2


def test_a_second_derivative_is_refused() -> None:
    given = inputs(1, 2, 2, 3, 3)
    (grad,) = torch.autograd.grad(
        coeff_attention(*given, implementation="blockwise").square().sum(), given[0], create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), given[1])


def test_leading_dimensions_empty_sizes_and_masks_with_gradient() -> None:
    q, k, v = (draw(3, 4, 2, n, 5, seed=n).requires_grad_() for n in (6, 7, 8 - 1))
    coeff = draw(2, 2, seed=3).requires_grad_()
    compare([q, k, v, coeff], attn_mask=draw(4, 1, 1, 7, seed=2) < 1)
    compare([q, k, v, coeff], attn_mask=draw(6, 7, seed=2))
    compare([t[0, 0] if t.dim() > 2 else t for t in (q, k, v, coeff)])
    empty = coeff_attention(q, k[..., :0, :], v[..., :0, :], coeff, implementation="blockwise")
    assert empty.shape == q.shape and (empty == 0).all()
    bias = draw(6, 7, seed=2).requires_grad_()
    with pytest.raises(ValueError, match="no gradient for attn_mask"):
        coeff_attention(q, k, v, coeff, bias, implementation="blockwise")
    big = torch.zeros(1, 12, 512, 4)
    bias = torch.zeros(512, 512, requires_grad=True)
    coeff_attention(big, big, big, torch.eye(12), bias).sum().backward()  # auto: the reference
    assert prefers_blocks(1, 12, 512, 512) and bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    exact = [t.detach() for t in inputs(2, 4, 2, 40, 50, 16, 16)]
    low = [t.to(dtype).requires_grad_() for t in exact[:3]] + [exact[3].float().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in low]
    out = coeff_attention(*low, enable_gqa=True, implementation="blockwise")
    want = coeff_attention(*exact, enable_gqa=True, implementation="reference")
    assert out.dtype == dtype
    for one, two in zip(
        (out, *torch.autograd.grad(out.float().square().sum(), low)),
        (want, *torch.autograd.grad(want.square().sum(), exact)),
        strict=True,
    ):
        assert (one.double() - two).abs().max() < 16 * torch.finfo(dtype).eps * two.abs().max()
    q, k, v, coeff = (t.detach().float() for t in exact)
    with torch.autocast("cpu", dtype):
        cast = coeff_attention(q, k, v, coeff, enable_gqa=True, implementation="blockwise")
    assert torch.equal(cast, out)
    slightly = coeff_attention(*low[:3], torch.eye(4) * 1.003, enable_gqa=True, implementation="blockwise")
    assert not torch.equal(
        slightly, coeff_attention(*low[:3], torch.eye(4), enable_gqa=True, implementation="blockwise")
    )


def test_compile() -> None:
    given = [t.detach().float().requires_grad_() for t in inputs(2, 4, 2, 9, 9)]
    torch._dynamo.reset()

    def call(*tensors: Tensor) -> Tensor:
        return coeff_attention(*tensors, is_causal=True, enable_gqa=True, implementation="blockwise")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(
        torch.autograd.grad(compiled(*given).square().sum(), given),
        torch.autograd.grad(call(*copy.copy(given)).square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
