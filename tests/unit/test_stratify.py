"""Parts with several labels, with whole groups, and set apart from a user's training split."""

import numpy as np
import pytest

from coeft.config import CV
from coeft.data._data import Data, draw
from coeft.data._folds import make_folds
from coeft.data._part import Part
from coeft.data._settings import ImageData
from coeft.data._source import Source, Split
from coeft.data._stratify import grouped_folds, iterative, label_table, whole_groups
from coeft.errors import UserError


def several(count: int, seed: int = 0) -> np.ndarray:
    """Labels that go together, from frequent to rare, and samples without any."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 4)) < [0.5, 0.2, 0.1, 0.03]).astype(np.float32)
    labels[:, 2] *= labels[:, 0]
    return labels


def test_every_part_has_its_share_of_every_label() -> None:
    labels = several(400)
    assigned = iterative(labels, [0.7, 0.2, 0.1], 3)
    for part, share in enumerate((0.7, 0.2, 0.1)):
        mine = labels[assigned == part]
        assert len(mine) == pytest.approx(share * 400, abs=4)
        np.testing.assert_allclose(mine.sum(0), share * labels.sum(0), atol=2)
    again = iterative(labels, [0.7, 0.2, 0.1], 3)
    assert (again == assigned).all() and (iterative(labels, [0.7, 0.2, 0.1], 4) != assigned).any()


def test_folds_of_several_labels_keep_their_proportions() -> None:
    labels = several(300)
    part = Part(stores=[], rows=np.zeros((300, 2), np.int64), labels=labels, names=np.arange(300).astype(object))
    data = Data(train=part, val=None, test=None, class_names=list("abcd"), fingerprint="")
    folds = make_folds(data, CV(folds=5), 0)
    assert sorted(name for fold in folds if fold.heldout for name in fold.heldout.names) == list(range(300))
    for fold in folds:
        assert fold.heldout is not None and fold.val is not None
        np.testing.assert_allclose(fold.heldout.labels.sum(0), labels.sum(0) / 5, atol=2)
        np.testing.assert_allclose(fold.val.labels.sum(0), fold.train.labels.sum(0) / 9, atol=3)
        assert not {*fold.train.names} & {*fold.val.names, *fold.heldout.names}
    part.groups = np.array([f"g{n % 40}" for n in range(300)], dtype=object)
    for fold in make_folds(data, CV(folds=5, group="g"), 0):
        assert fold.heldout is not None and fold.val is not None
        sides = [{*side.groups} for side in (fold.train, fold.val, fold.heldout) if side.groups is not None]
        assert sum(map(len, sides)) == 40 == len(set.union(*sides))
        np.testing.assert_allclose(fold.heldout.labels.sum(0), labels.sum(0) / 5, atol=12)
        assert len(fold.heldout) == pytest.approx(60, abs=12)


def test_groups_fill_folds_evenly() -> None:
    groups = np.repeat([f"g{n}" for n in range(12)], [30, 20, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5])
    labels = (np.arange(120) % 3 == 0).astype(np.float32)[:, None]
    folds = grouped_folds(groups, label_table(labels, np.zeros(120, np.int64), 1), 4, 0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(120))
    assert [len(fold) for fold in folds] == [30] * 4


def source(labels: np.ndarray, groups: np.ndarray | None = None, *, test: bool = False) -> Source:
    def split() -> Split:
        names = [f"n{number}" for number in range(len(labels))]
        return Split(items=np.zeros((len(labels), 1, 1), np.uint8), labels=labels, names=names, groups=groups)

    return Source(train=split(), test=split() if test else None, class_names=["a", "b"])


LABELS = np.repeat([0, 1], [160, 40])


def test_a_share_is_set_apart_in_proportion_to_the_classes() -> None:
    settings = ImageData(test_fraction=0.25)
    splits, _ = draw(settings, source(LABELS), 0)
    train, test = splits["train"], splits["test"]
    assert train is not None and test is not None
    assert np.bincount(test.labels).tolist() == [40, 10] and np.bincount(train.labels).tolist() == [120, 30]
    assert not {*train.names} & {*test.names} and len({*train.names, *test.names}) == 200
    again, other = (draw(settings, source(LABELS), seed)[0]["test"] for seed in (0, 1))
    assert again is not None and other is not None
    assert again.names == test.names != other.names
    with pytest.raises(UserError, match="data.test_fraction=0.25: the data has a test split"):
        draw(settings, source(LABELS, test=True), 0)
    with pytest.raises(UserError, match="both choose the test part"):
        ImageData(test_fraction=0.25, n_test=5)


@pytest.mark.parametrize("settings", [{"test_fraction": 0.25}, {"n_test": 50}])
def test_a_test_part_keeps_groups_whole(settings: dict) -> None:
    groups = np.array([f"patient {n // 5}" for n in range(200)], dtype=object)
    splits, _ = draw(ImageData(**settings), source(LABELS, groups), 0)
    train, test = splits["train"], splits["test"]
    assert train is not None and test is not None and train.groups is not None and test.groups is not None
    assert not {*train.groups} & {*test.groups} and len(train) + len(test) == 200
    assert np.bincount(test.labels).tolist() == pytest.approx([40, 10], abs=5)
    with pytest.raises(UserError, match="there is one group alone"):
        draw(ImageData(**settings), source(LABELS, np.array(["x"] * 200, dtype=object)), 0)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1])
def test_fractions_keep_the_classes_in_proportion_and_lie_in_each_other(fraction: float) -> None:
    labels = np.repeat([0, 1], [1600, 400])

    def names(share: float, seed: int = 0) -> list[str]:
        train = draw(ImageData(fraction=share), source(labels), seed)[0]["train"]
        assert train is not None
        assert np.bincount(train.labels).tolist() == pytest.approx([1600 * share, 400 * share], abs=1)
        return list(train.names)

    assert {*names(fraction)} <= {*names(1)} and {*names(0.01)} <= {*names(fraction)} | {*names(0.1)}
    assert fraction == 1 or names(fraction) != names(fraction, 1)


def test_what_is_taken_of_groups_is_near_the_share() -> None:
    groups = np.array([f"g{n % 20}" for n in range(200)])
    table = label_table(LABELS, LABELS, 2)
    taken = whole_groups(groups, table, 0.3, 0)
    np.testing.assert_allclose(table[taken].sum(0), [48, 12], atol=4)
