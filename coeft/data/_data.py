"""From a source to parts ready for training: splits chosen, subsets drawn, pixels decoded once."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coeft.backbones._backbone import Preprocessing
from coeft.data._cache import Pixels, decode
from coeft.data._folders import images_below
from coeft.data._settings import ImageData
from coeft.data._source import Source, Split, fingerprint
from coeft.errors import UserError
from coeft.seeding import derive

log = logging.getLogger(__name__)

EXAMPLES = 5  # names that a message lists


@dataclass(kw_only=True)
class Part:
    """Decoded images with their labels; a subset shares the pixels of what it was taken from."""

    stores: list[Pixels]
    """Where the pixels are: in memory, or memory-mapped."""
    rows: np.ndarray
    """int64 (N, 2): store and row of each image."""
    labels: np.ndarray
    """int64 (N,); -1 where unknown."""
    names: np.ndarray
    """(N,) of str."""
    groups: np.ndarray | None = None
    """(N,) of str, values of the group column."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.stores[0].shape
        return channels, height, width

    @property
    def images(self) -> np.ndarray:
        """All pixels in memory, uint8 (N, C, H, W); `fetch` reads only some."""
        return self.fetch(np.arange(len(self)))

    def fetch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of the pixels at these positions, uint8 (len(indices), C, H, W)."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        if len(self.stores) == 1:
            return self.stores[0].fetch(rows[:, 1])
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        for number, store in enumerate(self.stores):
            here = rows[:, 0] == number
            images[here] = store.fetch(rows[here, 1])
        return images

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Part":
        """The images at these positions, in this order; no pixel is copied."""
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
        """All images of several parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        rows: list[np.ndarray] = []
        stores: list[Pixels] = []
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


@dataclass(kw_only=True)
class Data:
    """What a run trains and is evaluated on."""

    train: Part
    val: Part | None
    test: Part | None
    class_names: list[str]
    fingerprint: str
    """Hash of the images that are used, with labels and class names; the same on any machine."""
    skipped: list[str] = field(default_factory=list)
    """Unreadable images that were left out: name and reason."""
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Part -> uint8 (N, 16), a hash of each image's contents."""

    @property
    def parts(self) -> dict[str, Part | None]:
        """train, val, test -> images or None."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def summary(self) -> dict[str, Any]:
        """What a dry run prints, ready for JSON.

        {"splits": {part: {"images", "classes": {name: count}, "groups"} or null}, "image_shape": [C, H, W],
        "duplicates": {"train": n, "train/test": n, ...}: images whose contents occur before in the same part, or also
        in the other one; "duplicate_names": the first of them; "unreadable": [...], "warnings": [...], "fingerprint"}
        """
        counts, names = duplicates(self)
        return {
            "splits": {key: None if part is None else self._counts(part) for key, part in self.parts.items()},
            "image_shape": list(self.train.image_shape),
            "duplicates": counts,
            "duplicate_names": names,
            "unreadable": list(self.skipped),
            "warnings": list(self.warnings),
            "fingerprint": self.fingerprint,
        }

    def _counts(self, part: Part) -> dict[str, Any]:
        totals = np.bincount(part.labels, minlength=len(self.class_names))
        return {
            "images": len(part),
            "classes": {name: int(count) for name, count in zip(self.class_names, totals, strict=True)},
            "groups": None if part.groups is None else len(set(part.groups)),
        }


def duplicates(data: Data) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Counts of images with equal contents, within each part and between two parts, and some of their names."""
    where: dict[str, dict[bytes, list[int]]] = {}
    counts: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for key, digests in data.digests.items():
        found: dict[bytes, list[int]] = defaultdict(list)
        for index, digest in enumerate(digests):
            found[digest.tobytes()].append(index)
        where[key] = found
    parts = list(where)
    for position, first in enumerate(parts):
        part = data.parts[first]
        assert part is not None
        repeated = [indices for indices in where[first].values() if len(indices) > 1]
        counts[first] = sum(len(indices) - 1 for indices in repeated)
        if repeated:
            names[first] = [" = ".join(str(part.names[i]) for i in indices) for indices in repeated[:EXAMPLES]]
        for second in parts[position + 1 :]:
            other = data.parts[second]
            assert other is not None
            shared = [digest for digest in where[second] if digest in where[first]]
            pair = f"{first}/{second}"
            counts[pair] = sum(len(where[second][digest]) for digest in shared)
            if shared:
                names[pair] = [
                    f"{part.names[where[first][digest][0]]} = {other.names[where[second][digest][0]]}"
                    for digest in shared[:EXAMPLES]
                ]
    return counts, names


def resolve_preprocessing(settings: ImageData, backbone: Preprocessing) -> Preprocessing:
    """The backbone's preprocessing with what `data.*` sets in its place.

    Raises:
        UserError: the number of means or standard deviations is not that of the backbone's channels.
    """
    changes: dict[str, Any] = {}
    if settings.image_size is not None:
        changes["image_size"] = (settings.image_size, settings.image_size)
    for key in ("mean", "std"):
        values = getattr(settings, key)
        if values is None:
            continue
        if len(values) != len(backbone.mean):
            raise UserError(
                f"data.{key} has {len(values)} values, but the backbone takes {len(backbone.mean)} channels: "
                f"give {len(backbone.mean)} values, or null"
            )
        changes[key] = tuple(float(value) for value in values)
    for key in ("interpolation", "crop_pct", "resize"):
        if getattr(settings, key) is not None:
            changes[key] = getattr(settings, key)
    return replace(backbone, **changes)


def load_data(
    settings: ImageData,
    *,
    seed: int,
    preprocessing: Preprocessing,
    group: str | None = None,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Data:
    """The parts of a run, drawn, decoded and resized.

    Args:
        settings: one of the data kinds.
        seed: of the subsets that n_train, n_val, n_test and fraction ask for.
        preprocessing: as `resolve_preprocessing` gives it.
        group: column whose values the parts' `groups` hold; null is none.
        progress: called with the part and its images done and in all while decoding.

    Raises:
        UserError: the data is missing or broken, or has fewer images than asked for.
    """
    source = settings.load(seed, group)
    splits, warnings = draw(settings, source, seed)
    parts: dict[str, Part | None] = {}
    used: dict[str, Split | None] = {}
    skipped: list[str] = []
    problems: list[str] = []
    for key, split in splits.items():
        parts[key] = used[key] = None
        if split is None:
            continue
        try:
            decoded = decode(
                split,
                preprocessing,
                made_from=f"{settings.kind}, {key}, {preprocessing.image_size[0]}x{preprocessing.image_size[1]}",
                on_error=settings.on_error,
                threads=settings.num_workers,
                progress=lambda done, total, key=key: progress(key, done, total),  # type: ignore[misc]
            )
        except UserError as error:  # the other splits may have mistakes too
            problems.append(str(error))
            continue
        skipped += [f"{split.names[row]}: {reason}" for row, reason in decoded.bad.items()]
        kept = _without(split, decoded.good)
        if not len(kept):
            raise UserError(f"no image of the {key} split can be read; the first: {skipped[-len(split)]}")
        parts[key], used[key] = _part(kept, decoded.pixels, decoded.good), kept
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    train = parts["train"]
    assert train is not None
    if skipped:
        warnings.append(f"{len(skipped)} unreadable images left out (data.on_error=skip); the first: {skipped[0]}")
    absent = [name for i, name in enumerate(source.class_names) if not (train.labels == i).any()]
    if absent:
        listed = ", ".join(absent[:EXAMPLES]) + (", ..." if len(absent) > EXAMPLES else "")
        warnings.append(f"{len(absent)} of {len(source.class_names)} classes have no training image: {listed}")
    for warning in warnings:
        log.warning("%s", warning)
    return Data(
        train=train,
        val=parts["val"],
        test=parts["test"],
        class_names=list(source.class_names),
        fingerprint=fingerprint(used, source.class_names),
        skipped=skipped,
        warnings=warnings,
        digests={key: split.digests for key, split in used.items() if split is not None},
    )


def _without(split: Split, good: np.ndarray) -> Split:
    """The readable images of a split, with the hashes it already has."""
    if len(good) == len(split):
        return split
    kept = split.subset(good)
    kept.digests = split.digests[good]
    return kept


def _part(split: Split, store: Pixels, rows: np.ndarray) -> Part:
    return Part(
        stores=[store],
        rows=np.stack([np.zeros(len(rows), np.int64), rows], 1),
        labels=np.asarray(split.labels, np.int64),
        names=np.array(list(split.names), dtype=object),
        groups=None if split.groups is None else np.asarray(split.groups, dtype=object),
    )


def draw(settings: ImageData, source: Source, seed: int) -> tuple[dict[str, Split | None], list[str]]:
    """Subsets of a source as n_train, n_val, n_test and fraction ask for, and warnings.

    A smaller number gives a subset of what a larger one gives. The images keep the source's order.

    Raises:
        UserError: a number is more than there are.
    """
    warnings = list(source.warnings)
    num_classes = len(source.class_names)
    splits = dict(source.splits)
    rest = np.arange(len(source.train))
    for key in ("test", "val"):
        count, own = getattr(settings, f"n_{key}"), splits[key]
        if count is None:
            continue
        if own is not None:
            _enough(f"data.n_{key}", count, len(own), f"the {key} split")
            order = balanced(own.labels, num_classes, derive(seed, "subset", key))[:count]
            splits[key] = own.subset(np.sort(order))
            continue
        # One image at least has to stay for training.
        _enough(f"data.n_{key}", count, len(rest) - 1, f"the train split that the {key} part can be taken from")
        order = balanced(source.train.labels[rest], num_classes, derive(seed, "subset", key))[:count]
        splits[key] = source.train.subset(np.sort(rest[order]))
        rest = np.setdiff1d(rest, rest[order])
    labels = source.train.labels[rest]
    if settings.n_train is not None:
        _enough("data.n_train", settings.n_train, len(rest), "the train split")
        chosen = balanced(labels, num_classes, derive(seed, "subset", "train"))[: settings.n_train]
        rest = rest[np.sort(chosen)]
    elif settings.fraction is not None:
        count = max(1, round(settings.fraction * len(rest)))
        chosen = proportional(labels, num_classes, derive(seed, "subset", "train"))[:count]
        rest = rest[np.sort(chosen)]
    if len(rest) < len(source.train):
        splits["train"] = source.train.subset(rest)
    return splits, warnings


def _enough(key: str, count: int, available: int, where: str) -> None:
    if count > available:
        raise UserError(
            f"{key}={count} is more than the {available:,} images of {where}; set it to {available} or less"
        )


def _ranks(labels: np.ndarray, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per image, its place in a random order of its class and a tie-breaker of its class; the sizes of all classes."""
    rng = np.random.default_rng(seed)
    tie = rng.permutation(num_classes)
    rank = np.zeros(len(labels), np.int64)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        rank[members] = rng.permutation(len(members))
    return rank, tie[labels], np.bincount(labels, minlength=num_classes)


def balanced(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """A random order whose every beginning holds equally many images of each class, as far as there are."""
    rank, tie, _ = _ranks(labels, num_classes, seed)
    return np.lexsort((tie, rank))


def proportional(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """A random order whose every beginning holds the classes in the proportions of the whole."""
    rank, tie, sizes = _ranks(labels, num_classes, seed)
    return np.lexsort((tie, (rank + 0.5) / sizes[labels]))


def load_inputs(paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing, on_error: str = "raise") -> Part:
    """Images to predict: files, and all images below folders, sorted; labels are -1, names the paths as given.

    Raises:
        UserError: a path does not exist, a folder has no image, or an image cannot be read (on_error=raise).
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = images_below(path).images
            if not found:
                raise UserError(f"{given}: the folder has no image")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{given}: no such file or folder")
    if not files:
        raise UserError("no input: give image files or folders")
    split = Split(items=files, labels=np.full(len(files), -1, np.int64), names=[str(path) for path in files])
    # Seldom predicted twice, so not worth the cache; memory is bounded by handing over batches of paths.
    decoded = decode(split, preprocessing, made_from="inputs", on_error=on_error, keep=False)
    for row, reason in decoded.bad.items():
        log.warning("%s left out: %s", split.names[row], reason)
    return _part(_without(split, decoded.good), decoded.pixels, decoded.good)
