"""Which texts share a row."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coeft.data._language import prompt_of
from coeft.data._packing import collate, collate_packed, pack
from coeft.data._tokens import IGNORED


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60), st.integers(0, 3))
def test_every_text_is_in_one_row_that_holds_it_and_rows_are_few(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 32, seed)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    filled = [sum(lengths[position] for position in row) for row in rows]
    assert all(0 < size <= 32 for size in filled)
    assert len(rows) <= math.floor(11 / 9 * math.ceil(sum(lengths) / 32) + 6 / 9) + sum(n > 16 for n in lengths)
    assert sum(size <= 16 for size in filled) <= 1  # two half-empty rows would be one


def test_long_texts_are_filled_up_with_short_ones() -> None:
    lengths = [5, 3, 6, 2, 8, 4, 4]
    rows = pack(lengths, 8, 0)
    assert sorted(sorted(lengths[i] for i in row) for row in rows) == [[2, 6], [3, 5], [4, 4], [8]]


def test_rows_follow_from_the_seed() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 300)
    assert pack(lengths, 40, 1) == pack(lengths, 40, 1)
    assert pack(lengths, 40, 1) != pack(lengths, 40, 2)


def test_a_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit into rows of 8"):
        pack([3, 9], 8, 0)


def test_a_hundred_thousand_texts_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 100_000)
    rows = pack(lengths, 2048, 0)
    assert len(rows) <= 1.002 * lengths.sum() / 2048


def test_padded_and_packed_batches() -> None:
    first = (np.array([5, 6, 7]), np.array([False, True, True]))
    second = (np.array([8, 9]), np.array([True, True]))
    padded = collate([first, second], 0)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    packed = collate_packed([[first, second], [second, second]], 0)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 8, 9, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]
    # the first token of a text is not predicted from the last of the one before
    assert packed["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 9, IGNORED, 9, IGNORED]]
    assert "attention_mask" not in packed


@pytest.mark.parametrize(
    ("mask", "prompt", "expected"),
    [
        ([0, 0, 1, 1, 1], [0, 1], [2, 3, 4]),
        ([0, 1, 0, 0, 1, 1, 0], [0, 1, 2, 3], [4, 5]),  # the last answer of a chat
        ([1, 1, 1, 1, 1, 1], [0, 1, 2], [3, 4, 5]),  # plain text: its second half
        ([0, 1, 1, 1, 1, 1], [0, 1, 2], [3, 4, 5]),  # the same after a beginning-of-text token
    ],
)
def test_what_is_asked_for_of_a_row(mask: list[int], prompt: list[int], expected: list[int]) -> None:
    assert prompt_of({"ids": np.arange(len(mask)), "mask": np.array(mask)}) == (prompt, expected)
