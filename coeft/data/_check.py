"""What is suspicious in data: contents on two sides or under two labels, classes that are alike or nearly empty."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from coeft.data._data import Data
    from coeft.data._folds import Fold

EXAMPLES = 5  # that a message lists
NAMED = 10  # pairs that a warning about leakage names

Place = tuple[str, int]
"""A part and a position in it."""


def same_contents(digests: dict[str, np.ndarray]) -> list[list[Place]]:
    """The places of samples whose contents occur more than once, one list for each content, in the order of the parts.

    Args:
        digests: part -> uint8 (N, 16), a hash of each sample's contents.
    """
    parts = [part for part, found in digests.items() if len(found)]
    if not parts:
        return []
    hashes = np.concatenate([np.ascontiguousarray(digests[part]) for part in parts]).view("<u8")  # (N, 2)
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    equal = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    if not equal.any():
        return []
    starts = np.cumsum([0, *(len(digests[part]) for part in parts)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    runs = [order[first : last + 1] for first, last in edges.reshape(-1, 2)]

    def place(row: int) -> Place:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[part], int(row - starts[part])

    return [[place(row) for row in run] for run in sorted(runs, key=lambda run: int(run[0]))]


def name_of(data: "Data", place: Place) -> str:
    """What a message calls a sample."""
    part = data.parts[place[0]]
    assert part is not None
    return str(part.names[place[1]])


def duplicates(data: "Data") -> tuple[dict[str, int], dict[str, list[str]]]:
    """Counts of samples with equal contents, within each part and between two parts, and some of their names.

    Within a part, the copies beyond the first count; between two, those of the second that the first has too.
    """
    parts = list(data.digests)
    counts = dict.fromkeys(parts, 0)
    pairs = [(first, second) for i, first in enumerate(parts) for second in parts[i + 1 :]]
    counts |= {f"{first}/{second}": 0 for first, second in pairs}
    names: dict[str, list[str]] = defaultdict(list)
    for run in data.same:
        where: dict[str, list[Place]] = defaultdict(list)
        for place in run:
            where[place[0]].append(place)
        for part, places in where.items():
            counts[part] += len(places) - 1
            if len(places) > 1:
                names[part].append(" = ".join(name_of(data, place) for place in places))
        for first, second in pairs:
            if first in where and second in where:
                counts[f"{first}/{second}"] += len(where[second])
                names[f"{first}/{second}"] += [
                    f"{name_of(data, where[first][0])} = {name_of(data, place)}" for place in where[second]
                ]
    return counts, dict(names)


def leakage(data: "Data") -> list[str]:
    """A warning if samples of the test split are in the training split too, with their names."""
    counts, names = duplicates(data)
    warnings = []
    for pair in ("train/test", "val/test"):
        if counts.get(pair):
            first = pair.partition("/")[0]
            warnings.append(
                f"{counts[pair]} of the {len(data.test or [])} test samples are also in the {first} split, which "
                f"overstates the result: {_listed(names[pair], NAMED)}"
            )
    return warnings


def fold_leakage(data: "Data", folds: "Sequence[Fold]") -> list[str]:
    """A warning if contents of a fold's training part are also in the part that scores it, or that picks its epoch."""
    content = {name_of(data, place): number for number, run in enumerate(data.same) for place in run}
    if not content:
        return []
    warnings = []
    for what, part_of, why in (
        ("held-out samples are also in the training part of their fold", "heldout", "which overstates the result"),
        ("validation samples are also in the training part", "val", "so that the epoch is picked on what was seen"),
    ):
        shared: list[str] = []
        for fold in folds:
            part = getattr(fold, part_of)
            if part is None:
                continue
            seen: dict[int, str] = {}
            for name in fold.train.names:
                if name in content:
                    seen.setdefault(content[name], name)
            copies = [name for name in part.names if content.get(name) in seen]
            shared += [f"{seen[content[name]]} = {name}" for name in copies]
        if shared:
            warnings.append(f"{len(shared)} {what}, {why}; remove the copies: {_listed(shared, NAMED)}")
            break  # the second follows from the same copies
    return warnings


def suspicious(data: "Data", folds: int) -> list[str]:
    """Labels that look like mistakes, in one sentence each.

    Args:
        folds: of the cross-validation; 0 or 1 is none.
    """
    return [*two_labels(data), *alike(data.class_names), *rare(data, folds)]


def two_labels(data: "Data") -> list[str]:
    """Equal contents whose labels differ."""

    def label(place: Place) -> str:
        part = data.parts[place[0]]
        assert part is not None
        value = part.labels[place[1]]
        if part.labels.ndim == 2:
            return " and ".join(name for name, holds in zip(data.class_names, value, strict=True) if holds) or "none"
        if part.labels.dtype == np.int64 and len(data.class_names):
            return data.class_names[int(value)]
        return f"{value:g}"

    found = []
    for run in data.same:
        labels: dict[str, Place] = {}
        for place in run:
            labels.setdefault(label(place), place)
        if len(labels) > 1:
            found.append("; ".join(f"{name_of(data, place)} is {text}" for text, place in labels.items()))
    if not found:
        return []
    what = "content has" if len(found) == 1 else "contents have"
    return [f"{len(found)} {what} two labels: {_listed(found, EXAMPLES)}"]


def alike(class_names: Sequence[str]) -> list[str]:
    """Classes whose names differ by case, spaces, underscores or their Unicode form alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in class_names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups["".join(plain.replace("_", " ").split())].append(name)
    return [
        f"classes that differ by case or spaces alone: {', '.join(map(repr, names))}; one class?"
        for names in groups.values()
        if len(names) > 1
    ]


def rare(data: "Data", folds: int) -> list[str]:
    """Classes with too few samples to be in every part of a division."""
    if not len(data.class_names):
        return []
    counts = data.train.class_counts(len(data.class_names))
    if counts is None:
        return []
    if folds > 1 and data.val is not None:
        more = data.val.class_counts(len(data.class_names))
        assert more is not None
        counts = counts + more
    least, why = (folds, f"fewer than cv.folds={folds}") if folds > 1 else (2, "too few to train and to pick the epoch")
    few = [f"{name} has {count}" for name, count in zip(data.class_names, counts, strict=True) if 0 < count < least]
    if not few:
        return []
    return [f"{len(few)} {'class has' if len(few) == 1 else 'classes have'} {why}: {_listed(few, EXAMPLES)}"]


def _listed(texts: Sequence[str], count: int) -> str:
    more = f"; and {len(texts) - count} more" if len(texts) > count else ""
    return "; ".join(texts[:count]) + more
