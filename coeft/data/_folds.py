"""Dividing data into training, validation and held-out parts; a group is never on two sides."""

from dataclasses import dataclass

import numpy as np

from coeft.config import CV
from coeft.data._data import Data, proportional
from coeft.data._part import Part, strata
from coeft.data._stratify import grouped_folds, iterative, label_table, whole_groups
from coeft.errors import UserError
from coeft.seeding import derive


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The parts of one training."""

    index: int
    """0, 1, ...; cv.folds for the training on all data that follows the folds."""
    train: Part
    val: Part | None
    """Picks the epoch."""
    heldout: Part | None
    """Scored once, with the epoch that val picked; None in standard training."""
    test: Part | None
    """The data's own test split."""


def make_folds(data: Data, cv: CV, seed: int) -> list[Fold]:
    """One fold for standard training (cv.folds 0 or 1), else cv.folds folds over train and val together.

    Standard training takes the data's validation split, or else a part of cv.val_fraction of train.

    Raises:
        UserError: too few samples of a class or too few groups, no group column, or a group in two splits.
    """
    _check_groups(data, cv)
    if cv.folds < 2:
        train, val = data.train, data.val
        if val is None:
            train, val = _set_apart(train, cv, data.class_names, derive(seed, "folds", "val", 0))
        return [Fold(index=0, train=train, val=val, heldout=None, test=data.test)]

    everything = _together(data)
    folds = []
    for index, heldout in enumerate(_divide(everything, data.class_names, cv, derive(seed, "folds"))):
        rest = everything.subset(np.setdiff1d(np.arange(len(everything)), heldout))
        train, val = _set_apart(rest, cv, data.class_names, derive(seed, "folds", "val", index))
        folds.append(Fold(index=index, train=train, val=val, heldout=everything.subset(heldout), test=data.test))
    return folds


def refit_fold(data: Data, cv: CV, seed: int) -> Fold:
    """All of train and val to train on, but for the part of cv.val_fraction that picks the epoch.

    Raises:
        UserError: as make_folds.
    """
    _check_groups(data, cv)
    train, val = _set_apart(_together(data), cv, data.class_names, derive(seed, "folds", "val", "refit"))
    return Fold(index=cv.folds, train=train, val=val, heldout=None, test=data.test)


def _together(data: Data) -> Part:
    return Part.joined([part for part in (data.train, data.val) if part is not None])


def _check_groups(data: Data, cv: CV) -> None:
    """Every part has groups if cv.group asks for them, and no group is in two parts that must be kept apart."""
    if cv.group is None:
        return
    parts = {key: part for key, part in data.parts.items() if part is not None}
    for key, part in parts.items():
        if part.groups is None:
            raise UserError(f"cv.group={cv.group}: the {key} split has no such column")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if first not in parts or second not in parts or (cv.folds >= 2 and second == "val"):
            continue
        one, other = parts[first].groups, parts[second].groups
        assert one is not None and other is not None
        if shared := sorted(set(one) & set(other)):
            listed = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
            raise UserError(
                f"cv.group={cv.group}: {len(shared)} groups are in both the {first} and the {second} split ({listed}); "
                f"move each to one split, or set data.splits.{second}=null"
            )


def _divide(part: Part, class_names: list[str], cv: CV, seed: int) -> list[np.ndarray]:
    """Positions of each held-out fold, sorted: disjoint, together all of them.

    Raises:
        UserError: there are fewer groups, samples, or samples of a class than folds.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    groups = part.groups if cv.group is not None else None
    if groups is not None and (number := len(set(groups))) < cv.folds:
        raise UserError(f"cv.folds={cv.folds}, but cv.group={cv.group} has {number} groups; lower cv.folds")
    if len(part) < cv.folds:
        raise UserError(f"cv.folds={cv.folds}, but there are {len(part)} samples; lower cv.folds")
    classes, count = strata(part.labels, class_names)
    stratified = cv.stratified and count > 1
    if stratified:
        counts = np.bincount(classes, minlength=count)
        few = [f"{name} has {n}" for name, n in zip(class_names, counts, strict=True) if 0 < n < cv.folds]
        if few:
            listed = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
            raise UserError(
                f"cv.folds={cv.folds} stratified folds need {cv.folds} samples of each class: {listed}; "
                "lower cv.folds, or set cv.stratified=false"
            )
    several = cv.stratified and part.labels.ndim == 2
    if several and groups is not None:
        folds = grouped_folds(groups, label_table(part.labels, classes, count), cv.folds, seed)
    elif several:
        assigned = iterative(part.labels, [1 / cv.folds] * cv.folds, seed)
        folds = [np.flatnonzero(assigned == fold) for fold in range(cv.folds)]
    elif groups is not None:
        splitter = (StratifiedGroupKFold if stratified else GroupKFold)(cv.folds, shuffle=True, random_state=seed)
        folds = [heldout for _, heldout in splitter.split(np.zeros(len(part)), classes, groups)]
    else:
        splitter = (StratifiedKFold if stratified else KFold)(cv.folds, shuffle=True, random_state=seed)
        folds = [heldout for _, heldout in splitter.split(np.zeros(len(part)), classes)]
    if any(not len(fold) for fold in folds):
        sizes = ", ".join(str(len(fold)) for fold in folds)
        raise UserError(
            f"cv.folds={cv.folds}: the groups of column {cv.group} are too uneven, the folds have {sizes} samples; "
            "lower cv.folds, or set cv.stratified=false"
        )
    return folds


def _set_apart(part: Part, cv: CV, class_names: list[str], seed: int) -> tuple[Part, Part | None]:
    """A part without its validation part of cv.val_fraction, and that one, or None if the fraction is 0.

    Raises:
        UserError: nothing would be left of one of the two.
    """
    if cv.val_fraction == 0:
        return part, None
    count = max(1, round(cv.val_fraction * len(part)))
    classes, num_classes = strata(part.labels, class_names)
    if cv.group is not None:
        assert part.groups is not None
        if len(names := set(part.groups)) < 2:
            raise UserError(
                f"cv.group={cv.group} has one group, {str(*names)!r}, in the training part: none is left to "
                "pick the epoch; set cv.val_fraction=0, or give more groups"
            )
        labels = part.labels if cv.stratified else np.zeros(len(part), np.int64)
        table = label_table(labels, classes if cv.stratified else labels, num_classes)
        chosen = whole_groups(part.groups, table, cv.val_fraction, seed)
    elif cv.stratified and part.labels.ndim == 2:
        assigned = iterative(part.labels, [1 - count / len(part), count / len(part)], seed)
        chosen = np.flatnonzero(assigned)
        if not len(chosen):
            chosen = np.random.default_rng(seed).permutation(len(part))[:1]
    elif cv.stratified:
        chosen = proportional(classes, num_classes, seed)[:count]
    else:
        chosen = np.random.default_rng(seed).permutation(len(part))[:count]
    if len(chosen) >= len(part):
        raise UserError(f"cv.val_fraction={cv.val_fraction} of {len(part)} samples leaves none to train on; lower it")
    rest = np.setdiff1d(np.arange(len(part)), chosen)
    return part.subset(rest), part.subset(np.sort(chosen))
