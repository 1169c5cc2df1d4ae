"""Which samples a contact sheet shows: some of each class and split, and those that are in two places."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coeft.data._check import Place
from coeft.seeding import derive

if TYPE_CHECKING:
    from coeft.data._data import Data
    from coeft.data._part import Part

CLASSES = 24  # rows of a sheet
COLUMNS = {"train": 6, "val": 2, "test": 3}
SHARED = 3  # rows of contents that occur twice


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A row: a label, and for each column of the sheet a sample or none."""

    label: str
    places: list[Place | None]


def picture(part: "Part", row: int) -> np.ndarray | None:
    """A sample as pixels, uint8 (C, H, W): an image, or a spectrogram, low bands below; None if it is neither."""
    sample = part.fetch([row])[0]
    if not isinstance(sample, np.ndarray):
        return None
    if sample.ndim == 3 and sample.dtype == np.uint8:
        return sample
    if sample.ndim != 2 or not np.isfinite(sample).all():
        return None
    low, high = float(sample.min()), float(sample.max())
    shades: np.ndarray = ((sample[::-1] - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)[None]
    return shades


def columns_of(data: "Data") -> list[str]:
    """The split that each column of a sheet shows."""
    return [part for part, count in COLUMNS.items() if data.parts[part] is not None for _ in range(count)]


def examples(data: "Data", seed: int) -> tuple[list[Shown], int]:
    """Rows of a sheet, drawn from a seed, and how many classes there are beyond them.

    Labels that are numbers are shown from the smallest to the largest, in one row.
    """
    names = list(data.class_names)
    if data.train.class_counts(len(names)) is None:
        return [*_numbers(data), *_twice(data)], 0
    chosen = np.unique(np.linspace(0, len(names) - 1, min(CLASSES, len(names))).round().astype(int))
    rows = [_of_class(data, int(label), seed) for label in chosen]
    return [*rows, *_twice(data)], len(names) - len(rows)


def _of_class(data: "Data", label: int, seed: int) -> Shown:
    places: list[Place | None] = []
    counts = []
    for key, count in COLUMNS.items():
        part = data.parts[key]
        if part is None:
            continue
        has = part.labels[:, label] > 0 if part.labels.ndim == 2 else part.labels == label
        members = np.flatnonzero(has)
        drawn = np.random.default_rng(derive(seed, "examples", key, label)).permutation(members)[:count]
        places += [(key, int(row)) for row in np.sort(drawn)] + [None] * (count - len(drawn))
        counts.append(f"{key} {len(members):,}")
    return Shown(label=f"{data.class_names[label]}\n{', '.join(counts)}", places=places)


def _numbers(data: "Data") -> list[Shown]:
    """The training samples from the smallest number to the largest, or from the first to the last without numbers."""
    order = np.argsort(data.train.labels, kind="stable")
    width = len(columns_of(data))
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(width, len(order))).round().astype(int))]
    values = f": {data.train.labels[rows[0]]:g} to {data.train.labels[rows[-1]]:g}"
    places: list[Place | None] = [("train", int(row)) for row in rows]
    return [Shown(label=f"train{values}", places=places + [None] * (width - len(places)))]


def _twice(data: "Data") -> list[Shown]:
    """Contents in two splits first, then those with two labels or twice in a split; one row each."""
    width = len(columns_of(data))
    across = [run for run in data.same if len({part for part, _ in run}) > 1]
    within = [run for run in data.same if len({part for part, _ in run}) == 1]
    rows = []
    for run in [*across, *within][:SHARED]:
        splits = list(dict.fromkeys(part for part, _ in run))
        what = f"equal files in {' and '.join(splits)}"
        places: list[Place | None] = [*run[:width]]
        rows.append(Shown(label=what, places=places + [None] * (width - len(places))))
    return rows
