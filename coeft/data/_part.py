"""Samples in the form a model takes them, with what is known of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from coeft.data._source import Split

Batch = dict[str, Tensor]
Progress = Callable[[int, int], None]
"""Called with the samples done and their number."""


class Store(Protocol):
    """Encoded samples of one split: pixels, or tokens."""

    def fetch(self, rows: np.ndarray) -> Any:
        """The samples at these rows: an array with one entry a sample, or a list."""

    def batch(self, fetched: Any) -> Batch:
        """Fetched samples as the model's inputs; may hold `labels` if every position of a sample has its own."""


@dataclass(kw_only=True)
class Encoded:
    """What an encoder made of a split."""

    store: Any
    """A Store."""
    good: np.ndarray
    """int64: positions of the usable samples; row i of the store belongs to position i."""
    bad: dict[int, str] = field(default_factory=dict)
    """Position -> why the sample cannot be used."""
    warnings: list[str] = field(default_factory=list)


class Encoder(Protocol):
    """Turns samples of a source into what one backbone takes."""

    modality: str
    """image or text: what the source must give."""

    def encode(
        self, split: "Split", *, made_from: str, on_error: str, threads: int, keep: bool, progress: Progress
    ) -> Encoded:
        """The samples of a split, from the cache where they are there.

        Args:
            made_from: a word for people, shown by `coeft cache`.
            on_error: raise or skip.
            threads: to work in; 0 is the machine's cores, at most 8.
            keep: put what was not in the cache there.

        Raises:
            UserError: a sample cannot be used (on_error=raise), or the cache cannot be written.
        """


@dataclass(kw_only=True)
class Part:
    """Encoded samples with their labels; a subset shares the stores of what it was taken from."""

    stores: list[Any]
    """Where the samples are (Store): in memory, or memory-mapped; all of one kind."""
    rows: np.ndarray
    """int64 (N, 2): store and row of each sample."""
    labels: np.ndarray
    """Classes int64 (N,), -1 where unknown; numbers float32 (N,); several classes float32 (N, C) of 0 and 1; where the
    text itself is the target, int64 zeros (N,)."""
    names: np.ndarray
    """(N,) of str."""
    groups: np.ndarray | None = None
    """(N,) of str, values of the group column."""

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> Any:
        """A copy of the samples at these positions as their store gives them; images are uint8 (n, C, H, W)."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        if len(self.stores) == 1:
            return self.stores[0].fetch(rows[:, 1])
        here = [np.flatnonzero(rows[:, 0] == number) for number in range(len(self.stores))]
        pieces = [store.fetch(rows[at, 1]) for store, at in zip(self.stores, here, strict=True)]
        if isinstance(pieces[0], np.ndarray):
            joined = np.empty((len(rows), *pieces[0].shape[1:]), pieces[0].dtype)
            for at, piece in zip(here, pieces, strict=True):
                joined[at] = piece
            return joined
        samples: list[Any] = [None] * len(rows)
        for at, piece in zip(here, pieces, strict=True):
            for position, sample in zip(at, piece, strict=True):
                samples[position] = sample
        return samples

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """What the model takes of the samples at these positions, and their `labels`."""
        inputs: Batch = self.stores[0].batch(self.fetch(indices))
        return {"labels": torch.from_numpy(self.labels[np.asarray(indices, dtype=np.int64)]), **inputs}

    @property
    def images(self) -> np.ndarray:
        """All pixels in memory, uint8 (N, C, H, W); `fetch` reads only some."""
        images: np.ndarray = self.fetch(np.arange(len(self)))
        return images

    def class_counts(self, num_classes: int) -> np.ndarray | None:
        """Samples of each class, (num_classes,); None where the labels are no classes."""
        if self.labels.ndim == 2:
            counts: np.ndarray = self.labels.sum(0).astype(np.int64)
            return counts
        if self.labels.dtype != np.int64 or not num_classes:
            return None
        return np.bincount(self.labels, minlength=num_classes)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Part":
        """The samples at these positions, in this order; nothing is copied from the stores."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Part(
            stores=self.stores,
            rows=self.rows[chosen],
            labels=self.labels[chosen],
            names=self.names[chosen],
            groups=None if self.groups is None else self.groups[chosen],
        )

    @staticmethod
    def joined(parts: Sequence["Part"]) -> "Part":
        """All samples of several parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        rows: list[np.ndarray] = []
        stores: list[Any] = []
        for part in parts:
            shifted = part.rows.copy()
            shifted[:, 0] += len(stores)
            rows.append(shifted)
            stores += part.stores
        groups = [part.groups for part in parts if part.groups is not None]
        return Part(
            stores=stores,
            rows=np.concatenate(rows),
            labels=np.concatenate([part.labels for part in parts]),
            names=np.concatenate([part.names for part in parts]),
            groups=np.concatenate(groups) if len(groups) == len(parts) else None,
        )


def strata(labels: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, int]:
    """A class for each sample, to keep proportions by, and how many there are: one class for all where labels are none.

    int64 (N,) in [0, count).
    """
    if labels.ndim == 1 and labels.dtype == np.int64 and class_names:
        return labels, len(class_names)
    return np.zeros(len(labels), np.int64), 1
