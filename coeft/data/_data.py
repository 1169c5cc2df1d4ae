"""From a source to parts ready for training: splits chosen, subsets drawn, samples encoded once."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from coeft.data._check import EXAMPLES, Place, alike, duplicates, leakage, same_contents, suspicious, two_labels
from coeft.data._part import Encoded, Encoder, Part, strata
from coeft.data._settings import ImageData
from coeft.data._source import Source, Split, fingerprint
from coeft.data._stratify import iterative, label_table, whole_groups
from coeft.data._tokens import TokenStore
from coeft.errors import UserError
from coeft.seeding import derive

log = logging.getLogger(__name__)

NOUNS = {"image": "images", "text": "rows", "audio": "clips"}


@dataclass(kw_only=True)
class Data:
    """What a run trains and is evaluated on."""

    train: Part
    val: Part | None
    test: Part | None
    class_names: list[str]
    fingerprint: str
    """Hash of the samples that are used, with labels and class names; the same on any machine."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """The same of each part that there is."""
    skipped: list[str] = field(default_factory=list)
    """Samples that cannot be used and were left out: name and reason."""
    empty: list[str] = field(default_factory=list)
    """Class folders without a sample that were left out, and why."""
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Part -> uint8 (N, 16), a hash of each sample's contents."""

    @property
    def parts(self) -> dict[str, Part | None]:
        """train, val, test -> samples or None."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @cached_property
    def same(self) -> list[list[Place]]:
        """The places of samples whose contents occur more than once."""
        return same_contents(self.digests)

    def summary(self, folds: int = 0) -> dict[str, Any]:
        """What a dry run prints, ready for JSON.

        Args:
            folds: of the cross-validation, which needs so many samples of a class; 0 or 1 is none.

        {"splits": {part: {"samples", "classes": {name: count}, "groups", for numbers "numbers": {"mean", "std", "min",
        "max"}, for text "tokens": {"median", "max", "longest" before cutting, "cut": rows}} or null},
        "duplicates": {"train": n, "train/test": n, ...}: samples whose contents occur before in the same part, or also
        in the other one; "duplicate_names": the first of them; "unreadable": [...], "warnings": [...], "fingerprint"}
        """
        counts, names = duplicates(self)
        return {
            "splits": {key: None if part is None else self._counts(part) for key, part in self.parts.items()},
            "duplicates": counts,
            "duplicate_names": names,
            "unreadable": list(self.skipped),
            "empty": list(self.empty),
            "suspicious": suspicious(self, folds),
            "warnings": list(self.warnings),
            "fingerprint": self.fingerprint,
        }

    def _counts(self, part: Part) -> dict[str, Any]:
        totals = part.class_counts(len(self.class_names))
        counts: dict[str, Any] = {
            "samples": len(part),
            "classes": {} if totals is None else dict(zip(self.class_names, totals.tolist(), strict=True)),
            "groups": None if part.groups is None else len(set(part.groups)),
        }
        if part.labels.dtype == np.float32 and part.labels.ndim == 1:
            values = part.labels.astype(np.float64)
            found = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
            counts["numbers"] = {name: float(value) for name, value in found.items()}
        if isinstance(store := part.stores[0], TokenStore):
            lengths = store.lengths(part.rows[:, 1])
            counts["tokens"] = {
                "median": float(np.median(lengths)),
                "max": int(lengths.max()),
                "longest": store.longest,
                "cut": store.cut,
            }
        return counts


def load_data(
    settings: ImageData,
    *,
    seed: int,
    encoder: Encoder,
    target: str = "class",
    group: str | None = None,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Data:
    """The parts of a run, drawn and encoded.

    Args:
        settings: one of the data kinds.
        seed: of the subsets that n_train, n_val, n_test, fraction and shots ask for.
        encoder: what the backbone takes.
        target: what the task learns: class, classes, number, text or choice.
        group: column whose values the parts' `groups` hold; null is none.
        progress: called with the part and its samples done and in all while encoding.

    Raises:
        UserError: the data is missing or broken, does not fit the backbone or the task, or has fewer samples than
            asked for.
    """
    check_fit(settings, encoder.modality, target)
    source = settings.load(seed, group, modality=encoder.modality, target=target)
    splits, warnings = draw(settings, source, seed)
    encoded: dict[str, Encoded] = {}
    problems: list[str] = []
    for key, split in splits.items():
        if split is None:
            continue
        try:
            encoded[key] = encoder.encode(
                split,
                made_from=f"{settings.kind}, {key}",
                on_error=settings.on_error,
                threads=settings.num_workers,
                keep=True,
                progress=lambda done, total, key=key: progress(key, done, total),  # type: ignore[misc]
            )
        except UserError as error:  # the other splits may have mistakes too
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return _data(source, splits, encoded, warnings, NOUNS[encoder.modality])


def check_fit(settings: ImageData, modality: str, target: str) -> None:
    """Refuse data that has not what the backbone takes or the task learns.

    Raises:
        UserError: says what the data has.
    """
    if modality not in settings.modalities:
        has = " or ".join(settings.modalities)
        raise UserError(
            f"data={settings.kind} has {has}s, but the backbone takes {modality}: choose another of the two"
        )
    if settings.balance and target not in ("class", "classes"):
        raise UserError(
            f"data.balance={settings.balance:g} draws by classes, but the task learns {target}; set it to 0"
        )
    if target not in settings.targets:
        has = " or ".join(settings.targets)
        raise UserError(
            f"data={settings.kind} has {has} to learn, but the task needs {target}: choose another of the two"
        )


def _data(
    source: Source, splits: dict[str, Split | None], encoded: dict[str, Encoded], warnings: list[str], noun: str
) -> Data:
    """What was encoded without what was left out, with warnings about both."""
    parts: dict[str, Part | None] = dict.fromkeys(splits)
    used: dict[str, Split | None] = dict.fromkeys(splits)
    skipped = list(source.skipped)
    for key, found in encoded.items():
        split = splits[key]
        assert split is not None
        skipped += [f"{split.names[row]}: {reason}" for row, reason in found.bad.items()]
        warnings += [f"{key}: {warning}" for warning in found.warnings]
        kept = _without(split, found.good)
        if not len(kept):
            raise UserError(f"no {noun[:-1]} of the {key} split can be read; the first: {skipped[-len(split)]}")
        parts[key], used[key] = make_part(kept, found), kept
    train = parts["train"]
    assert train is not None
    if skipped:
        warnings.append(f"{len(skipped)} unreadable {noun} left out; the first: {skipped[0]}")
    classes, count = strata(train.labels, source.class_names)
    present = np.bincount(classes, minlength=count)
    absent = [name for name, total in zip(source.class_names, present, strict=False) if not total]
    if absent and count == len(source.class_names):
        listed = ", ".join(absent[:EXAMPLES]) + (", ..." if len(absent) > EXAMPLES else "")
        warnings.append(f"{len(absent)} of {len(source.class_names)} classes have no training sample: {listed}")
    if source.empty:
        warnings.append(f"left out: {'; '.join(source.empty[:EXAMPLES])}")
    data = Data(
        train=train,
        val=parts["val"],
        test=parts["test"],
        class_names=list(source.class_names),
        fingerprint=fingerprint(used, source.class_names),
        fingerprints={key: fingerprint({key: split}, []) for key, split in used.items() if split is not None},
        skipped=skipped,
        empty=list(source.empty),
        warnings=warnings,
        digests={key: split.digests for key, split in used.items() if split is not None},
    )
    warnings += [*leakage(data), *two_labels(data), *alike(data.class_names)]
    for warning in warnings:
        log.warning("%s", warning)
    return data


def load_inputs(split: Split, encoder: Encoder, on_error: str = "raise") -> Part:
    """Samples to predict, whose labels are unknown.

    Raises:
        UserError: a sample cannot be used (on_error=raise), or none can.
    """
    # Seldom predicted twice, so not worth the cache; memory is bounded by handing over batches.
    found = encoder.encode(
        split, made_from="inputs", on_error=on_error, threads=0, keep=False, progress=lambda done, total: None
    )
    for row, reason in found.bad.items():
        log.warning("%s left out: %s", split.names[row], reason)
    for warning in found.warnings:
        log.warning("%s", warning)
    if not len(found.good):
        raise UserError(f"no input can be used; the first: {split.names[0]}: {found.bad[0]}")
    return make_part(_without(split, found.good), found)


def _without(split: Split, good: np.ndarray) -> Split:
    """The usable samples of a split, with the hashes it already has."""
    if len(good) == len(split):
        return split
    kept = split.subset(good)
    kept.digests = split.digests[good]
    return kept


def make_part(split: Split, encoded: Encoded) -> Part:
    """The samples of a split whose unusable ones are left out already."""
    rows = encoded.good
    return Part(
        stores=[encoded.store],
        rows=np.stack([np.zeros(len(rows), np.int64), rows], 1),
        labels=np.asarray(split.labels),
        names=np.array(list(split.names), dtype=object),
        groups=None if split.groups is None else np.asarray(split.groups, dtype=object),
    )


def draw(settings: ImageData, source: Source, seed: int) -> tuple[dict[str, Split | None], list[str]]:
    """Subsets of a source as n_train, n_val, n_test, fraction and shots ask for, and warnings.

    A smaller number gives a subset of what a larger one gives. The samples keep the source's order.

    Raises:
        UserError: a number is more than there are, or shots are asked for where samples have no single class.
    """
    warnings = list(source.warnings)
    splits = dict(source.splits)
    labels, num_classes = strata(source.train.labels, source.class_names)
    rest = np.arange(len(source.train))
    if settings.test_fraction is not None and splits["test"] is not None:
        raise UserError(
            f"data.test_fraction={settings.test_fraction:g}: the data has a test split; set it or data.splits.test=null"
        )
    for key in ("test", "val"):
        count, own = getattr(settings, f"n_{key}"), splits[key]
        share = settings.test_fraction if key == "test" else None
        if count is None and share is None:
            continue
        if own is not None:
            _enough(f"data.n_{key}", count, len(own), f"the {key} split")
            order = balanced(strata(own.labels, source.class_names)[0], num_classes, derive(seed, "subset", key))
            splits[key] = own.subset(np.sort(order[:count]))
            continue
        # One sample at least has to stay for training.
        wanted = max(1, round(share * len(rest))) if share is not None else count
        name = f"data.n_{key}" if share is None else "data.test_fraction"
        _enough(name, wanted, len(rest) - 1, f"the train split that the {key} part can be taken from")
        chosen = _apart(source.train.subset(rest), source.class_names, wanted, share, name, derive(seed, "subset", key))
        splits[key] = source.train.subset(np.sort(rest[chosen]))
        rest = np.setdiff1d(rest, rest[chosen])
    labels = labels[rest]
    if settings.n_train is not None:
        _enough("data.n_train", settings.n_train, len(rest), "the train split")
        chosen = balanced(labels, num_classes, derive(seed, "subset", "train"))[: settings.n_train]
        rest = rest[np.sort(chosen)]
    elif settings.fraction is not None:
        count = max(1, round(settings.fraction * len(rest)))
        chosen = proportional(labels, num_classes, derive(seed, "subset", "train"))[:count]
        rest = rest[np.sort(chosen)]
    elif settings.shots is not None:
        _enough_of_each(settings.shots, source, labels, num_classes)
        rank = _ranks(labels, num_classes, derive(seed, "subset", "train"))[0]
        rest = rest[rank < settings.shots]
    if len(rest) < len(source.train):
        splits["train"] = source.train.subset(rest)
    return splits, warnings


def _apart(split: Split, class_names: list[str], count: int, share: float | None, key: str, seed: int) -> np.ndarray:
    """Positions that are set apart: class-balanced, or in proportion where a share is asked for; groups stay whole.

    Raises:
        UserError: there is only one group.
    """
    classes, num_classes = strata(split.labels, class_names)
    if split.groups is not None:
        if len(set(split.groups)) < 2:
            raise UserError(f"{key}={share or count}: there is one group alone, which cannot be divided")
        return whole_groups(split.groups, label_table(split.labels, classes, num_classes), count / len(split), seed)
    if share is None:
        return balanced(classes, num_classes, seed)[:count]
    if split.labels.ndim == 2:
        return np.flatnonzero(iterative(split.labels, [1 - share, share], seed))
    return proportional(classes, num_classes, seed)[:count]


def _enough(key: str, count: int, available: int, where: str) -> None:
    if count > available:
        raise UserError(
            f"{key}={count} is more than the {available:,} samples of {where}; set it to {available} or less"
        )


def _enough_of_each(shots: int, source: Source, labels: np.ndarray, num_classes: int) -> None:
    """Refuse more shots than a class has samples, and samples without a class of their own."""
    if num_classes != len(source.class_names) or source.train.labels.ndim != 1:
        raise UserError(
            f"data.shots={shots} draws samples of each class, but these have no single class to learn; "
            "data.n_train draws a number of them"
        )
    sizes = np.bincount(labels, minlength=num_classes)
    few = np.flatnonzero(sizes < shots)
    if len(few):
        named = [f"{source.class_names[place]} has {sizes[place]}" for place in few[:EXAMPLES]]
        more = f" and {len(few) - EXAMPLES} more classes" if len(few) > EXAMPLES else ""
        raise UserError(
            f"data.shots={shots} is more than some classes have to train on: {', '.join(named)}{more}; "
            + (f"set it to {sizes.min()} or less" if sizes.min() else "leave these classes out of the data")
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
