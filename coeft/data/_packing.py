"""Several short texts in one row: which go together, and what a row says of where they begin."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coeft.data._tokens import IGNORED
from coeft.seeding import derive


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Positions of texts that share a row of `capacity` tokens, one list a row: best-fit-decreasing.

    Longest first, equally long ones in an order drawn from the seed; each goes into the fullest row that it fits in,
    among equals the one begun first, else into a new one. Best fit has the same bound as first fit, 11/9 of the
    optimum (Johnson 1974), and needs no search over all rows. Rows are shuffled by the seed, so that the long texts do
    not all come first.

    Raises:
        ValueError: a text is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.max()) > capacity:
        raise ValueError(f"a text of {int(sizes.max())} tokens does not fit into rows of {capacity}")
    rng = np.random.default_rng(derive(seed, "packing"))
    order = np.lexsort((rng.permutation(len(sizes)), -sizes))
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted; full rows are not in it
    for position in order.tolist():
        size = int(sizes[position])
        at = bisect_left(space, (size, 0))
        if at == len(space):
            rows.append([position])
            free, row = capacity, len(rows) - 1
        else:
            free, row = space.pop(at)
            rows[row].append(position)
        if free > size:
            insort(space, (free - size, row))
    return [rows[index] for index in rng.permutation(len(rows))]


def collate(texts: Sequence[tuple[np.ndarray, np.ndarray]], pad: int) -> dict[str, Tensor]:
    """A batch of one text a row, padded on the right.

    Args:
        texts: of each row, its tokens int (T,) and which of them are learnt, bool (T,).
        pad: token that fills rows up.
    Returns:
        input_ids, attention_mask, labels: int64 (B, T). Labels stand where their tokens do; whoever takes the loss
        compares them with the prediction one place before.
    """
    ids, labels = _rows([[text] for text in texts], pad)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(texts):
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collate_packed(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], pad: int) -> dict[str, Tensor]:
    """A batch of several texts a row, as transformers' models tell them apart: by positions that start anew.

    There must be no attention mask beside it, nor a cache (use_cache=False): with either, transformers would let the
    texts of a row see each other and say nothing. Positions that fill a row up are a text of their own.

    Args:
        rows: of each row, its texts as of `collate`.
    Returns:
        input_ids, position_ids, labels: int64 (B, T). The first token of every text has no label: nothing that stands
        before it belongs to it.
    """
    ids, labels = _rows(rows, pad)
    positions = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = 0
        for tokens, _ in row:
            positions[number, start : start + len(tokens)] = torch.arange(len(tokens))
            start += len(tokens)
        positions[number, start:] = torch.arange(ids.shape[1] - start)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _rows(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    for number, row in enumerate(rows):
        start = 0
        for tokens, learnt in row:
            stop = start + len(tokens)
            ids[number, start:stop] = tokens
            labels[number, start:stop] = np.where(learnt, tokens, IGNORED)
            labels[number, start] = IGNORED
            start = stop
    return torch.from_numpy(ids), torch.from_numpy(labels)
