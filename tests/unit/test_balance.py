"""Classes made even: how often an epoch draws each sample, and weights in the training loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from coeft.data import _module
from coeft.data._balance import drawn, expected_draws, strata_of
from coeft.data._module import TrainOrder
from coeft.errors import UserError
from coeft.tasks.classification import Classification

LABELS = np.repeat([0, 1, 2], [70, 25, 5])


def order(labels: np.ndarray, balance: float = 1.0, **names: int) -> TrainOrder:
    width = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    seeds = {"seed": 0, "fold": 0, "epoch": 0, **names}
    return TrainOrder(
        len(labels), expected=expected_draws(labels, width, balance), classes=strata_of(labels), **seeds
    )  # fmt: skip


# The draw


def test_even_classes_are_drawn_equally_often() -> None:
    for epoch in range(20):
        counts = np.bincount(LABELS[list(order(LABELS, epoch=epoch))])
        assert counts.sum() == 100 and set(counts) <= {33, 34}
        times = np.bincount(list(order(LABELS, epoch=epoch)), minlength=100)
        assert set(times[:70]) == {0, 1}  # 33 of 70, none of them twice
        assert set(times[95:]) <= {6, 7}  # 33 / 5


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_a_class_is_drawn_by_its_share_to_the_power(balance: float) -> None:
    shares = np.array([0.7, 0.25, 0.05]) ** (1 - balance)
    expected = expected_draws(LABELS, 3, balance)
    assert expected.sum() == pytest.approx(100)
    sums = np.bincount(LABELS, weights=expected)
    np.testing.assert_allclose(sums, 100 * shares / shares.sum(), rtol=1e-12)


def test_draws_are_what_is_expected_on_average() -> None:
    expected = expected_draws(LABELS, 3, 0.5)
    total = sum(np.bincount(list(order(LABELS, 0.5, epoch=epoch)), minlength=100) for epoch in range(2000))
    # a sample's count differs from its expectation by less than one in an epoch: a standard deviation of at most 1/2
    np.testing.assert_allclose(total / 2000, expected, atol=4.5 * 0.5 / 2000**0.5)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_every_draw_is_between_floor_and_ceiling(labels: np.ndarray, balance: float, seed: int) -> None:
    expected = expected_draws(labels, 5, balance)
    times = np.bincount(drawn(expected, labels, np.random.default_rng(seed)), minlength=len(labels))
    assert times.sum() == len(labels)
    assert (times >= np.floor(expected - 1e-6)).all() and (times <= np.ceil(expected + 1e-6)).all()


def test_a_sample_with_several_classes_counts_as_its_rarest() -> None:
    labels = np.zeros((60, 2), np.float32)
    labels[:40, 0] = 1
    labels[36:42, 1] = 1  # four of them with both, two alone; 18 with none
    expected = expected_draws(labels, 2, 1.0)
    factors = np.where(labels[:, 1] > 0, 60 / 6, np.where(labels[:, 0] > 0, 60 / 40, 60 / 18))
    np.testing.assert_allclose(expected, factors * 60 / factors.sum(), rtol=1e-12)
    assert len(list(order(labels))) == 60


def test_the_order_follows_from_seed_fold_and_epoch_alone() -> None:
    found = [list(order(LABELS, **names)) for names in ({}, {"seed": 1}, {"fold": 1}, {"epoch": 1})]
    assert len({tuple(each) for each in found}) == 4
    again = order(LABELS)
    again.set_epoch(1)
    assert list(again) == found[3]
    again.set_epoch(0)
    assert list(again) == found[0]  # and from nothing that was drawn before


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_draws_of_one(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shares = list(order(LABELS, fold=1)), []
    for rank in range(world):
        monkeypatch.setattr(_module, "_ranks", lambda rank=rank: (rank, world))
        shares.append(list(order(LABELS, fold=1)))
    assert len({len(share) for share in shares}) == 1
    together = [index for batch in zip(*shares, strict=True) for index in batch if index != _module.FILLER]
    assert together == whole


# Weights


def logits(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_balanced_weights_make_the_loss_the_mean_over_classes() -> None:
    task = Classification(class_weight="balanced").build(4)
    task.use_labels(LABELS, ["a", "b", "c", "d"])  # the last has no sample
    out, labels = logits(100, 4), torch.from_numpy(LABELS)
    each = F.cross_entropy(out, labels, reduction="none")
    wanted = torch.stack([each[labels == label].mean() for label in range(3)]).mean()
    batches = [slice(0, 33), slice(33, 90), slice(90, 100)]
    parts = [task.loss(out[at], {"labels": labels[at]}, training=True) * len(labels[at]) for at in batches]
    assert float(sum(parts)) / 100 == pytest.approx(float(wanted), rel=1e-5)
    plain = task.loss(out, {"labels": labels}, training=False)
    assert float(plain) == pytest.approx(float(each.mean()), rel=1e-5)  # what is reported has no weights


def test_weights_by_name_and_label_smoothing() -> None:
    task = Classification(class_weight={"b": 3}, label_smoothing=0.1).build(3)
    task.use_labels(LABELS, ["a", "b", "c"])
    out, labels = logits(100, 3), torch.from_numpy(LABELS)
    shares = torch.full((100, 3), 0.1 / 3, dtype=torch.float64) + 0.9 * F.one_hot(labels, 3)
    each = -(shares * torch.log_softmax(out, 1)).sum(1)
    wanted = (each * torch.tensor([1.0, 3.0, 1.0])[labels]).mean()
    assert float(task.loss(out, {"labels": labels}, training=True)) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(UserError, match=r"task.class_weight: the data has no class 'b'; did you mean bb\?"):
        task.use_labels(LABELS, ["a", "bb", "c"])


def test_balanced_weights_of_several_labels() -> None:
    labels = np.zeros((50, 3), np.float32)
    labels[:10, 0], labels[:40, 1] = 1, 1  # the third class has no sample
    task = Classification(class_weight="balanced", multi_label=True, metric="micro_f1").build(3)
    task.use_labels(labels, ["a", "b", "c"])
    out, truth = logits(50, 3), torch.from_numpy(labels).double()
    weight = torch.tensor([40 / 10, 10 / 40, 1.0])
    shares = torch.sigmoid(out)
    wanted = -(weight * truth * shares.log() + (1 - truth) * (1 - shares).log()).mean()
    assert float(task.loss(out, {"labels": truth}, training=True)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("value", [0, "even", {}, {"a": 0}, {"a": float("inf")}, {"a": True}, {"a": "2"}, [1, 2]])
def test_what_is_no_weight_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="task.class_weight"):
        Classification(class_weight=value)
