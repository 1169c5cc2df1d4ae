"""What is suspicious in data is found and named."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coeft.data._check import alike, duplicates, fold_leakage, leakage, rare, same_contents, two_labels
from coeft.data._data import Data
from coeft.data._examples import COLUMNS, columns_of, examples
from coeft.data._folds import Fold
from coeft.data._part import Part


def part(contents: str, labels: object, name: str) -> Part:
    """Samples whose letters are their contents; they are never fetched here."""
    count = len(contents)
    return Part(
        stores=[],
        rows=np.zeros((count, 2), np.int64),
        labels=np.asarray(labels),
        names=np.array([f"{name}/{number}{letter}" for number, letter in enumerate(contents)], dtype=object),
    )


def dataset(classes: str = "xyz", **parts: tuple[str, object]) -> Data:
    made = {key: part(contents, labels, key) for key, (contents, labels) in parts.items()}
    digests = {
        key: np.array([[ord(letter)] * 16 for letter in contents], np.uint8).reshape(-1, 16)
        for key, (contents, _) in parts.items()
    }
    return Data(
        train=made["train"], val=made.get("val"), test=made.get("test"), class_names=list(classes), fingerprint="",
        digests=digests,
    )  # fmt: skip


# Equal contents


@given(st.lists(st.lists(st.integers(0, 30), max_size=20), min_size=1, max_size=3))
def test_equal_contents_are_those_of_a_dictionary(parts: list[list[int]]) -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (31, 16), np.uint8)
    hashes[1] = hashes[0]
    hashes[1, 15] ^= 1  # one bit apart
    digests = {f"p{number}": hashes[rows] for number, rows in enumerate(parts)}
    where = defaultdict(list)
    for number, rows in enumerate(parts):
        for position, row in enumerate(rows):
            where[hashes[row].tobytes()].append((f"p{number}", position))
    assert same_contents(digests) == [places for places in where.values() if len(places) > 1]


def test_duplicates_are_counted_within_and_between_splits() -> None:
    data = dataset(train=("abcaa", [0] * 5), val=("xb", [0, 0]), test=("ayaz", [0] * 4))
    counts, names = duplicates(data)
    assert counts == {"train": 2, "val": 0, "test": 1, "train/val": 1, "train/test": 2, "val/test": 0}
    assert names["train"] == ["train/0a = train/3a = train/4a"]
    assert names["train/test"] == ["train/0a = test/0a", "train/0a = test/2a"]
    assert names["train/val"] == ["train/1b = val/1b"]


def test_leakage_names_the_files() -> None:
    [warning] = leakage(dataset(train=("abc", [0, 1, 2]), test=("xc", [0, 2])))
    assert warning.startswith("1 of the 2 test samples are also in the train split") and "train/2c = test/1c" in warning
    assert not leakage(dataset(train=("aab", [0, 0, 1]), test=("x", [0])))
    many = leakage(dataset(train=("a", [0]), test=("a" * 30, [0] * 30)))[0]
    assert "and 20 more" in many and many.count("=") == 10


def test_copies_on_both_sides_of_a_fold_are_told() -> None:
    data = dataset(train=("abcadb", [0] * 6))

    def fold(index: int, train: list[int], heldout: list[int] | None, val: list[int] | None = None) -> Fold:
        chosen = [None if rows is None else data.train.subset(rows) for rows in (train, val, heldout)]
        assert chosen[0] is not None
        return Fold(index=index, train=chosen[0], val=chosen[1], heldout=chosen[2], test=None)

    [warning] = fold_leakage(data, [fold(0, [0, 1, 2], [3, 4, 5]), fold(1, [3, 4, 5], [0, 1, 2])])
    assert warning.startswith("4 held-out samples are also in the training part of their fold")
    assert "train/0a = train/3a" in warning and "train/5b = train/1b" in warning
    assert not fold_leakage(data, [fold(0, [0, 3], [1, 5])])  # copies lie on one side
    [warning] = fold_leakage(data, [fold(0, [0, 1, 2], None, [3, 4])])
    assert warning.startswith("1 validation samples are also in the training part")


# Labels


def test_one_content_with_two_labels() -> None:
    data = dataset(train=("abb", [0, 1, 2]), test=("aa", [0, 1]))
    [warning] = two_labels(data)
    assert warning.startswith("2 contents have two labels: ")
    assert "train/0a is x; test/1a is y" in warning and "train/1b is y; train/2b is z" in warning
    assert not two_labels(dataset(train=("aab", [1, 1, 2])))


def test_several_labels_and_numbers_may_contradict_each_other_too() -> None:
    flags = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32)
    [warning] = two_labels(dataset(train=("aab", flags)))
    assert warning.endswith("train/0a is x and y; train/1a is none")
    [warning] = two_labels(dataset("", train=("aab", np.array([1.5, 2.5, 1.5], np.float32))))
    assert warning.endswith("train/0a is 1.5; train/1a is 2.5")
    assert not two_labels(dataset("", train=("aab", np.zeros(3, np.int64))))  # text that is learnt has no label


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Rose", "rose"], 1), (["rose", "rose "], 1), (["a b", "a_b"], 1), (["a  b", "ab"], 1),
        (["Straße", "STRASSE"], 1), (["ﬁsh", "fish"], 1), (["a", "A", "b", "B", "c"], 2),
        (["rose", "roses"], 0), (["1", "-1"], 0), (["1", "10"], 0), (["a", "ä"], 0),
    ],
)  # fmt: skip
def test_names_that_differ_by_case_or_spaces_alone(names: list[str], expected: int) -> None:
    found = alike(names)
    assert len(found) == expected
    assert not expected or all(repr(name) in found[0] for name in names[:2])


def test_classes_with_fewer_samples_than_folds() -> None:
    data = dataset(train=("abcdef", [0, 0, 0, 1, 1, 2]), val=("g", [2]))
    assert rare(data, 3) == ["2 classes have fewer than cv.folds=3: y has 2; z has 2"]
    assert rare(data, 2) == []
    assert rare(data, 0) == ["1 class has too few to train and to pick the epoch: z has 1"]
    assert rare(dataset("", train=("ab", np.array([1, 2], np.float32))), 5) == []


# Examples


def test_examples_show_every_class_and_split() -> None:
    labels = np.arange(200) % 4
    data = dataset("wxyz", train=("".join(chr(40 + n) for n in range(200)), labels), test=("0123", [0, 1, 2, 2]))
    rows, more = examples(data, 0)
    assert columns_of(data) == ["train"] * COLUMNS["train"] + ["test"] * COLUMNS["test"] and more == 0
    classes = rows[:4]
    assert [row.label for row in classes][3] == "z\ntrain 50, test 0"
    for label, row in enumerate(classes):
        shown = [place for place in row.places if place is not None]
        assert len(row.places) == len(columns_of(data)) and len(shown) == 6 + [1, 1, 2, 0][label]
        assert all(data.parts[key].labels[at] == label for key, at in shown)
    assert "equal files in train and test" in [row.label for row in rows[4:]]
    assert examples(data, 0) == (rows, 0) and examples(data, 1)[0] != rows


def test_of_many_classes_some_are_shown_and_the_rest_is_counted() -> None:
    data = dataset("", train=("", np.zeros(0, np.int64)))
    data.class_names[:] = [f"c{n}" for n in range(100)]
    rows, more = examples(data, 0)
    assert len(rows) == 24 and more == 76 and rows[0].label.startswith("c0\n") and rows[-1].label.startswith("c99\n")


def test_numbers_are_shown_from_small_to_large() -> None:
    data = dataset("", train=("abcd", np.array([3, 1, 4, 2], np.float32)))
    rows, _ = examples(data, 0)
    assert rows[0].label == "train: 1 to 4" and rows[0].places[:4] == [(("train"), n) for n in (1, 3, 0, 2)]
