"""coeff_attention against a ten-line reference, torch's own attention, and by its properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coeft.attention.functional import coeff_attention


def reference(q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, seen: Tensor | None = None) -> Tensor:
    """One batch item, one head and one query at a time; `seen` (B, H, N, M) says which keys a query may use."""
    out = []
    for b in range(len(q)):
        maps = []
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h * k.shape[1] // q.shape[1]].T / math.sqrt(q.shape[-1])
            if seen is not None:
                scores = torch.where(seen[b, h], scores, torch.full_like(scores, -math.inf))
            weights = (scores - scores.max(1, keepdim=True).values.detach()).exp()
            maps.append(weights / weights.sum(1, keepdim=True))
        for g in range(q.shape[1]):
            out.append(sum(coeff[g, h] * maps[h] for h in range(q.shape[1])) @ v[b, g * v.shape[1] // q.shape[1]])
    return torch.stack(out).view(len(q), q.shape[1], q.shape[2], v.shape[-1])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# batch, heads, key heads, queries, keys, head size, value size: distinct primes, so that no mix-up can pass
CASES = {
    "square": (2, 3, 3, 7, 7, 5, 5),
    "ragged": (2, 3, 3, 7, 11, 5, 13),
    "more queries than keys": (2, 3, 3, 11, 7, 5, 5),
    "one batch item": (1, 3, 3, 7, 11, 5, 5),
    "one head": (2, 1, 1, 7, 11, 5, 5),
    "one query": (2, 3, 3, 1, 11, 5, 5),
    "grouped queries": (2, 6, 2, 7, 11, 5, 13),
    "one key head": (2, 3, 1, 7, 11, 5, 5),
}


def inputs(case: str, seed: int = 0) -> list[Tensor]:
    B, H, KV, N, M, E, D = CASES[case]
    q, k, v = draw(B, H, N, E, seed=seed), draw(B, KV, M, E, seed=seed + 1), draw(B, KV, M, D, seed=seed + 2)
    coeff = torch.eye(H, dtype=torch.float64) + draw(H, H, seed=seed + 3)
    return [t.requires_grad_() for t in (q, k, v, coeff)]


def masks(case: str) -> dict[str, Tensor | None]:
    """Masks by name; each leaves every query at least one key."""
    B, H, _, N, M, _, _ = CASES[case]
    random = torch.rand(B, H, N, M, generator=torch.Generator().manual_seed(5)) < 0.6
    random[..., 0] = True
    padding = torch.arange(M) < torch.arange(1, B + 1)[:, None] * M // B  # (B, M): the rest is padding
    causal = torch.ones(N, M, dtype=torch.bool).tril()
    return {"none": None, "random": random, "padding": padding[:, None, None], "causal": causal}


@pytest.mark.parametrize("mask", ["none", "random", "padding", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_reference(case: str, mask: str) -> None:
    B, H, KV, N, M, _, D = CASES[case]
    ours, theirs = inputs(case), inputs(case)
    seen = masks(case)[mask]
    target = draw(B, H, N, D, seed=9)
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": seen}
    out = coeff_attention(*ours, enable_gqa=KV != H, **options)
    expected = reference(*theirs, None if seen is None else seen.expand(B, H, N, M))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad((out * target).sum(), ours)
    wanted = torch.autograd.grad((expected * target).sum(), theirs)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert wanted[3].abs().max() > 1e-2


def test_the_derived_gradient_formulas_hold() -> None:
    """D_g = G_g v_g^T; dL/dalpha'_gh = <D_g, A_h>; dL/dv_g = (sum_h alpha'_gh A_h)^T G_g."""
    q, k, v, coeff = inputs("ragged")
    G = draw(2, 3, 7, 13, seed=9)
    dv, dcoeff = torch.autograd.grad((coeff_attention(q, k, v, coeff) * G).sum(), (v, coeff))
    A = (q @ k.transpose(-2, -1) / math.sqrt(5)).softmax(-1)
    D = G @ v.transpose(-2, -1)
    torch.testing.assert_close(dcoeff, torch.einsum("bgnm,bhnm->gh", D, A), rtol=1e-10, atol=1e-10)
    mixed = torch.einsum("gh,bhnm->bgnm", coeff, A)
    torch.testing.assert_close(dv, mixed.transpose(-2, -1) @ G, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_gradcheck(mask: str | None) -> None:
    q, k, v = (draw(1, 2, n, 3, seed=i).requires_grad_() for i, n in enumerate((3, 4, 4)))
    coeff = draw(2, 2, seed=3).requires_grad_()
    bias = draw(1, 2, 3, 4, seed=4)
    options = {
        None: {},
        "bool": {"attn_mask": bias < 0.8},
        "float": {"attn_mask": bias},
        "causal": {"is_causal": True},
    }[mask]
    assert torch.autograd.gradcheck(lambda *t: coeff_attention(*t, scale=0.7, **options), (q, k, v, coeff))


@pytest.mark.parametrize("case", CASES)
def test_the_identity_gives_torch_attention(case: str) -> None:
    q, k, v, _ = (t.detach().float() for t in inputs(case))
    B, H, KV, N, M, _, _ = CASES[case]
    eye = torch.eye(H)
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": draw(N, M, seed=8).float()}):
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=KV != H, **options)
        got = coeff_attention(q, k, v, eye, enable_gqa=KV != H, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_rows_without_a_key_are_as_in_torch() -> None:
    q, k, v, _ = (t.detach() for t in inputs("ragged"))
    eye = torch.eye(3, dtype=torch.float64)
    seen = torch.ones(7, 11, dtype=torch.bool)
    seen[2] = False
    for mask in (seen, torch.zeros(7, 11, dtype=torch.float64).masked_fill(~seen, -math.inf)):
        results = []
        for ours in (True, False):
            leaf = q.clone().requires_grad_()
            given = (leaf, k, v, eye, mask) if ours else (leaf, k, v, mask)
            out = coeff_attention(*given) if ours else F.scaled_dot_product_attention(*given)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
        (got, our_grad), (theirs, their_grad) = results
        assert (got[:, :, 2] == 0).all() and got[:, :, 3].abs().min() > 0
        torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("additive", [False, True])
def test_a_masked_key_or_value_changes_nothing_to_the_bit(dtype: torch.dtype, additive: bool) -> None:
    q, k, v, coeff = (t.detach().to(dtype) for t in inputs("ragged"))
    seen = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    seen[0, ..., 8:] = False
    seen[1, ..., 3] = False
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf) if additive else seen
    before = coeff_attention(q, k, v, coeff, mask)
    hidden = ~seen.transpose(-2, -1)
    other_k, other_v = torch.where(hidden, 7 + 3 * k, k), torch.where(hidden, -50 * v, v)
    assert torch.equal(coeff_attention(q, other_k, other_v, coeff, mask), before)
    assert not torch.equal(coeff_attention(q, other_k, other_v, coeff), coeff_attention(q, k, v, coeff))


def test_causal_queries_do_not_see_later_tokens_to_the_bit() -> None:
    q, k, v, coeff = (t.detach().float() for t in inputs("square"))
    before = coeff_attention(q, k, v, coeff, is_causal=True)
    k[:, :, 4:] += 3
    v[:, :, 4:] -= 5
    after = coeff_attention(q, k, v, coeff, is_causal=True)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_a_permutation_permutes_the_maps_of_the_heads() -> None:
    q, k, v, _ = (t.detach() for t in inputs("ragged"))
    order = torch.tensor([2, 0, 1])
    permutation = torch.eye(3, dtype=torch.float64)[order]
    mixed = coeff_attention(q, k, v, permutation)
    expected = F.scaled_dot_product_attention(q[:, order], k[:, order], v)
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)
    assert (mixed - F.scaled_dot_product_attention(q, k, v)).abs().max() > 0.1


def test_coefficients_alone_leave_the_convex_hull_of_the_values() -> None:
    """Target -v: every map gives a convex combination of the values 1 and 2, so none comes closer than 2."""
    q, k = draw(1, 2, 3, 5, seed=0), draw(1, 2, 4, 5, seed=1)
    v = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64).expand(1, 2, 4).unsqueeze(-1)
    target = -F.scaled_dot_product_attention(q, k, v)
    alpha = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([alpha], lr=0.5, max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (coeff_attention(q, k, v, torch.eye(2, dtype=torch.float64) + alpha) - target).square().mean()
        value.backward()
        return value

    start = optimizer.step(loss)
    assert start > 4  # distance of at least 2 from -2..-1 to the hull 1..2
    assert loss() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, coeff = (t.detach().to(dtype) for t in inputs("ragged"))
    exact = coeff_attention(q.double(), k.double(), v.double(), coeff.double())
    got = coeff_attention(q, k, v, coeff)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - exact).abs() <= unit * exact.abs() * 1.01 + 1e-6).all()


def test_small_coefficients_count_in_half_precision() -> None:
    q, k, v, _ = (t.detach().bfloat16() for t in inputs("ragged"))
    coeff = torch.eye(3) * 1.003  # rounds to 1 in bfloat16
    assert not torch.equal(coeff_attention(q, k, v, coeff), coeff_attention(q, k, v, torch.eye(3)))


def test_autocast_takes_mixed_types_as_torch_does() -> None:
    q, k, v, coeff = (t.detach().float() for t in inputs("ragged"))
    with torch.autocast("cpu", torch.bfloat16):
        got = coeff_attention(q, k, v.bfloat16(), coeff)
        assert got.dtype == F.scaled_dot_product_attention(q, k, v.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(got, coeff_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), coeff))


def test_dropout_acts_on_the_maps_before_mixing() -> None:
    """With one key and value 1, head g gives sum_h coeff[g, h] * drop_h: 0 or 2 a head at p = 1/2."""
    q, k, v = torch.zeros(1, 2, 4000, 3), torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 1)
    torch.manual_seed(0)
    out = coeff_attention(q, k, v, torch.tensor([[1.0, 10.0], [0.0, 1.0]]), dropout_p=0.5)[0, :, :, 0]
    assert set(out[0].tolist()) == {0.0, 2.0, 20.0, 22.0} and set(out[1].tolist()) == {0.0, 2.0}
    assert torch.equal(out[0] >= 20, out[1] == 2)  # one draw of a map serves all its combinations
    assert abs(out[0].mean() - 11) < 0.5
    assert (coeff_attention(q, k, v, torch.eye(2), dropout_p=1.0) == 0).all()


def test_leading_dimensions_and_empty_sizes() -> None:
    coeff = torch.eye(2) + draw(2, 2, seed=3).float()
    q, k, v = (draw(3, 4, 2, n, 5, seed=n).float() for n in (6, 7, 7))
    out = coeff_attention(q, k, v, coeff)
    torch.testing.assert_close(out[1, 2], coeff_attention(q[1, 2], k[1, 2], v[1, 2], coeff))
    assert coeff_attention(q, k[:1], v[:1], coeff).shape == out.shape
    assert coeff_attention(q[:0], k[:0], v[:0], coeff).shape == (0, 4, 2, 6, 5)
    assert (coeff_attention(q, k[..., :0, :], v[..., :0, :], coeff) == 0).all()


def bad(**changes: object) -> dict:
    given: dict = {
        "query": torch.zeros(2, 3, 7, 5),
        "key": torch.zeros(2, 3, 11, 5),
        "value": torch.zeros(2, 3, 11, 5),
        "coeff": torch.eye(3),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coeff": torch.eye(4)}, r"coeff must be a float matrix over the query heads, \(3, 3\).*coeff \[4, 4\]"),
        ({"coeff": torch.eye(3, dtype=torch.long)}, "coeff must be a float matrix"),
        ({"query": torch.zeros(7, 5)}, "at least the dimensions"),
        ({"key": torch.zeros(2, 3, 11, 4)}, r"same head size.*query \[2, 3, 7, 5\], key \[2, 3, 11, 4\]"),
        ({"value": torch.zeros(2, 3, 10, 5)}, "same number of tokens"),
        ({"value": torch.zeros(2, 1, 11, 5)}, "key and value must have the same number of heads"),
        ({"key": torch.zeros(2, 1, 11, 5), "value": torch.zeros(2, 1, 11, 5)}, "enable_gqa=True allows"),
        ({"key": torch.zeros(2, 2, 11, 5), "value": torch.zeros(2, 2, 11, 5), "enable_gqa": True}, "must divide"),
        ({"key": torch.zeros(5, 3, 11, 5)}, "leading dimensions"),
        ({"query": torch.zeros(2, 3, 7, 5).double()}, "one float type, not torch.float64, torch.float32"),
        ({"attn_mask": torch.ones(7, 12, dtype=torch.bool)}, r"attn_mask \[7, 12\] does not .*= \[2, 3, 7, 11\]"),
        ({"attn_mask": torch.ones(5, 1, 1, 7, 11, dtype=torch.bool)}, "does not broadcast"),
        ({"attn_mask": torch.ones(7, 11, dtype=torch.long)}, "attn_mask must be bool or float, not torch.int64"),
        ({"attn_mask": torch.ones(7, 11, dtype=torch.bool), "is_causal": True}, "is_causal excludes attn_mask"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], not 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coeff_attention(**bad(**changes))


def test_compile() -> None:
    q, k, v, coeff = (t.detach().float().requires_grad_() for t in inputs("ragged"))
    mask = torch.rand(7, 11) < 0.7
    torch._dynamo.reset()
    compiled = torch.compile(coeff_attention, fullgraph=True, backend="aot_eager")
    got, expected = compiled(q, k, v, coeff, mask), coeff_attention(q, k, v, coeff, mask)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v, coeff)),
        torch.autograd.grad(expected.square().sum(), (q, k, v, coeff)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
