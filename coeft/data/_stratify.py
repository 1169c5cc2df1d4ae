"""Dividing samples with several labels, or whole groups, so that every part has the labels in proportion."""

import numpy as np


def label_table(labels: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Float64 (N, columns) whose sums over a part are to be in proportion: a column a class, and one for all samples.

    Args:
        labels: as Part.labels.
        classes: as `strata` gives them, used where a sample has one class.
    """
    if labels.ndim == 2:
        return np.concatenate([labels > 0, np.ones((len(labels), 1))], 1).astype(np.float64)
    table = np.zeros((len(labels), num_classes))
    table[np.arange(len(labels)), classes] = 1
    return table


def iterative(labels: np.ndarray, shares: list[float], seed: int) -> np.ndarray:
    """A part for each sample, int64 (N,) in [0, len(shares)), with the samples of every label in these shares.

    The label with the fewest samples left goes first, each of its samples to the part that lacks most of it (Sechidis,
    Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data").

    Args:
        labels: (N, C) of 0 and 1.
        shares: of the parts, with sum 1.
    """
    rng = np.random.default_rng(seed)
    has = labels > 0
    wanted = np.array(shares)[:, None] * has.sum(0)  # (parts, C) samples that each part still lacks
    room = np.array(shares) * len(labels)
    assigned = np.full(len(labels), -1, np.int64)
    left = has.sum(0)

    def put(sample: int, part: int) -> None:
        assigned[sample] = part
        wanted[part, has[sample]] -= 1
        room[part] -= 1
        left[has[sample]] -= 1

    while left.any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        for sample in rng.permutation(np.flatnonzero(has[:, label] & (assigned < 0))):
            put(sample, int(np.lexsort((rng.random(len(shares)), room, wanted[:, label]))[-1]))
    for sample in rng.permutation(np.flatnonzero(assigned < 0)):
        put(sample, int(np.argmax(room)))
    return assigned


def whole_groups(groups: np.ndarray, table: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of groups that together come close to a share of each column of a table (N, columns), sorted.

    Large groups first, in a random order among equals, a group is taken if that brings the sums nearer to the wanted
    ones; one at least is taken and one at least is left. There must be two or more.
    """
    values, group_of = np.unique(groups.astype(str), return_inverse=True)
    sums = np.zeros((len(values), table.shape[1]))
    np.add.at(sums, group_of, table)
    sizes = np.bincount(group_of)
    wanted = share * sums.sum(0)
    order = np.random.default_rng(seed).permutation(len(values))
    order = order[np.argsort(-sizes[order], kind="stable")]
    taken: list[int] = []
    have = np.zeros(table.shape[1])
    for group in order:
        if len(taken) == len(values) - 1:
            break
        if ((have + sums[group] - wanted) ** 2).sum() < ((have - wanted) ** 2).sum():
            taken.append(int(group))
            have += sums[group]
    if not taken:  # every group is larger than what is wanted: the smallest comes nearest
        taken = [int(order[-1])]
    return np.flatnonzero(np.isin(group_of, taken))


def grouped_folds(groups: np.ndarray, table: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Positions of each of several parts of whole groups with alike sums of a table (N, columns), sorted.

    Large groups first, each to the part where the sums of squares grow least, which is the one that lacks most of what
    the group has.
    """
    values, group_of = np.unique(groups.astype(str), return_inverse=True)
    sums = np.zeros((len(values), table.shape[1]))
    np.add.at(sums, group_of, table)
    scale = np.maximum(table.sum(0), 1)
    order = np.random.default_rng(seed).permutation(len(values))
    order = order[np.argsort(-np.bincount(group_of)[order], kind="stable")]
    have = np.zeros((folds, table.shape[1]))
    part_of = np.zeros(len(values), np.int64)
    for group in order:
        growth = (((have + sums[group]) / scale) ** 2 - (have / scale) ** 2).sum(1)
        part_of[group] = int(np.argmin(growth))
        have[part_of[group]] += sums[group]
    return [np.flatnonzero(part_of[group_of] == part) for part in range(folds)]
