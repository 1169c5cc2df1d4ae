"""Texts for a causal language model: records to tokens, and tokens to batches, one text a row or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from coeft.data._chat import Renderer
from coeft.data._choices import ChoiceRenderer, Question, collate_choices
from coeft.data._packing import collate_packed, pack
from coeft.data._part import Batch, Encoded, Part
from coeft.data._text import DEFAULT_LENGTH, padding_of, tokenizer_identity
from coeft.data._tokens import Record, TextEncoder, Tokens, TokenStore
from coeft.errors import UserError
from coeft.generate import positions

if TYPE_CHECKING:
    from coeft.backbones._backbone import Backbone

Row = Mapping[str, np.ndarray]


class RowEncoder(TextEncoder):
    """Records (see Renderer) to rows of tokens with the mask of those that are learnt."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        # on the right: positions and causal masks then need not know of it
        self.padding = replace(padding_of(renderer.tokenizer), side="right")
        known = tokenizer_identity(renderer.tokenizer)
        self.identity = repr(("text 1", known, renderer.loss_on, renderer.max_length))

    def row(self, record: Record) -> Tokens:
        row = self.renderer.render(record)
        return Tokens(row.input_ids, [int(mark) for mark in row.learnt], None, row.cut)


class ChoiceEncoder(TextEncoder):
    """Records (see ChoiceRenderer) to questions with choices."""

    def __init__(self, renderer: ChoiceRenderer) -> None:
        self.renderer = renderer
        self.padding = replace(padding_of(renderer.tokenizer), side="right")
        known = tokenizer_identity(renderer.tokenizer)
        self.identity = repr(("choices 1", known, renderer.chat, renderer.max_length))

    def row(self, record: Record) -> Tokens:
        ids, marks = self.renderer.render(record).flat()
        return Tokens(ids, marks)

    def encode(self, *args: Any, **options: Any) -> Encoded:
        """See TextEncoder.encode."""
        found = super().encode(*args, **options)
        found.store = ChoiceStore(found.store)
        return found


@dataclass
class ChoiceStore:
    """Questions with their choices, each held as the row of tokens that Question.flat makes (Store)."""

    tokens: TokenStore

    def fetch(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, np.ndarray]]:
        """{"ids", "mask"} of each question."""
        return self.tokens.fetch(rows)

    def batch(self, fetched: Sequence[Row]) -> Batch:
        """See collate_choices."""
        questions = [Question.from_flat(row["ids"], row["mask"]) for row in fetched]
        return collate_choices(questions, self.tokens.padding.pad_id)


class PackedSamples(Dataset):
    """A part whose texts share rows: map-style, hands out whole batches, a row being one item.

    Args:
        part: its stores are TokenStores with masks.
        capacity: tokens of a row.
        seed: decides which texts share a row.
    """

    def __init__(self, part: Part, capacity: int, seed: int) -> None:
        self.part = part
        lengths = np.zeros(len(part), np.int64)
        for number, store in enumerate(part.stores):
            here = part.rows[:, 0] == number
            lengths[here] = store.lengths(part.rows[here, 1])
        self.rows = pack(lengths, capacity, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """The batch of one row."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """See collate_packed; and `texts`, int64 (B,), how many share each row."""
        chosen = [self.rows[index] for index in indices]
        fetched = iter(self.part.fetch([position for row in chosen for position in row]))
        texts = [[_text(next(fetched)) for _ in row] for row in chosen]
        batch = collate_packed(texts, self.part.stores[0].padding.pad_id)
        return batch | {"texts": torch.tensor([len(row) for row in chosen])}


def length_limit(backbone: "Backbone", wanted: int | None) -> int:
    """Tokens of a row: data.max_length, or what the model takes, at most 512.

    Raises:
        UserError: more than the model takes.
    """
    own = positions(backbone.model)
    if wanted is None:
        return DEFAULT_LENGTH if own is None else min(own, DEFAULT_LENGTH)
    if own is not None and wanted > own:
        raise UserError(f"data.max_length={wanted} is more than the {own} tokens that the model takes; lower it")
    return wanted


def _text(row: Row) -> tuple[np.ndarray, np.ndarray]:
    return row["ids"], row["mask"] != 0


def prompt_of(row: Row) -> tuple[list[int], list[int]]:
    """What a model is given of a row of tokens to generate, and what is expected: the last run of learnt tokens.

    A row that is learnt from its beginning on is divided in the middle.
    """
    learnt = np.flatnonzero(row["mask"] != 0)
    end = int(learnt[-1]) + 1
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    begin = int(learnt[breaks[-1] + 1]) if len(breaks) else int(learnt[0])
    if begin <= 1 < end - 1:
        begin = end // 2
    return row["ids"][:begin].tolist(), row["ids"][begin:end].tolist()
