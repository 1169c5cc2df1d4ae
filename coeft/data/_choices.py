"""Questions with several choices for a causal language model: one sequence a choice, scored by its likelihood."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coeft.data._chat import Renderer
from coeft.data._packing import collate
from coeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 26  # choices of a question: the letters of the alphabet
START, LARGEST = -1, 127


@dataclass(frozen=True)
class Question:
    """A question's choices as sequences of tokens."""

    sequences: tuple[tuple[tuple[int, ...], int], ...]
    """Of each choice: the tokens of question and choice, and how many at the end are the choice's."""
    sizes: tuple[int, ...]
    """Bytes of each choice as UTF-8."""

    def flat(self) -> tuple[list[int], list[int]]:
        """One row of tokens with marks, so that a TokenStore can hold it.

        Marks: -1 where a sequence begins, 0 on a question, and on a choice's tokens 1 more than a share of its bytes.
        """
        ids: list[int] = []
        marks: list[int] = []
        for (tokens, count), size in zip(self.sequences, self.sizes, strict=True):
            ids += tokens
            each, rest = divmod(size, count)
            shares = [1 + each + (place < rest) for place in range(count)]
            if max(shares) > LARGEST:
                raise UserError(f"a choice of {size} bytes in {count} tokens cannot be scored")
            marks += [START, *[0] * (len(tokens) - count - 1), *shares]
        return ids, marks

    @classmethod
    def from_flat(cls, ids: np.ndarray, marks: np.ndarray) -> "Question":
        """The question of `flat`."""
        starts = [*np.flatnonzero(marks == START).tolist(), len(ids)]
        sequences, sizes = [], []
        for start, end in zip(starts, starts[1:], strict=False):
            shares = marks[start + 1 : end].astype(np.int64)
            count = int((shares > 0).sum())
            sequences.append((tuple(ids[start:end].tolist()), count))
            sizes.append(int(shares.sum()) - count)
        return cls(tuple(sequences), tuple(sizes))


class ChoiceRenderer:
    """Turns records into questions with one tokenizer.

    A record has `question`, text; and its choices, see choices_of. With a chat template the
    question is the user's message and the choice the assistant's answer; without, the choice follows the question
    after a space. The end of text or turn is not scored.

    Args:
        chat: whether to use the tokenizer's chat template.
        max_length: longest sequence in tokens; longer questions lose their beginning.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, chat: bool = False, max_length: int | None = None
    ) -> None:
        self.renderer = Renderer(tokenizer)
        self.tokenizer: Any = tokenizer
        self.chat = chat
        self.max_length = max_length
        if chat:
            self.renderer.require_template()

    def render(self, record: Mapping[str, Any]) -> Question:
        """The sequences of a question.

        Raises:
            UserError: no question, fewer than two choices, or a choice that does not fit.
        """
        question = record.get("question")
        if question is None or not str(question).strip():
            raise UserError("the question is empty")
        choices = choices_of(record)
        sequences = []
        for choice in choices:
            before, tokens = self._sequence(str(question), choice)
            if self.max_length is not None and len(before) + len(tokens) > self.max_length:
                room = self.max_length - len(tokens)
                if room < 1:
                    raise UserError(f"a choice of {len(tokens)} tokens does not fit into data.max_length")
                before = before[-room:]
            sequences.append(((*before, *tokens), len(tokens)))
        return Question(tuple(sequences), tuple(len(choice.encode()) for choice in choices))

    def _sequence(self, question: str, choice: str) -> tuple[list[int], list[int]]:
        """The tokens before a choice and those of the choice."""
        if self.chat:
            return self.renderer.continued({"messages": [{"role": "user", "content": question}]}, choice)
        return self.renderer.continued({"prompt": question.rstrip()}, f" {choice}")


def choices_of(record: Mapping[str, Any]) -> list[str]:
    """The choices of a question: `choice_0`, `choice_1`, ... or `choices`.

    `choices` is a list of texts, a mapping with a list as `text` (as ARC has it), or JSON text of either.

    Raises:
        UserError: not between two and 26 texts.
    """
    value = record.get("choices")
    if "choice_0" in record:
        value = [record[f"choice_{number}"] for number in range(sum(key.startswith("choice_") for key in record))]
    if isinstance(value, str):
        value = _from_json(value)
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise UserError('choices must be a list such as ["yes", "no"]')
    choices = ["" if choice is None else str(choice).strip() for choice in value]
    if not 2 <= len(choices) <= MOST:
        raise UserError(f"{len(choices)} choices: there must be 2 to {MOST}")
    if not all(choices):
        raise UserError(f"choice {choices.index('') + 1} is empty")
    return choices


def own_labels(record: Mapping[str, Any]) -> list[str] | None:
    """A record's own names of its choices: `label` of a mapping with `text`; None without."""
    value = record.get("choices")
    value = _from_json(value) if isinstance(value, str) else value
    if isinstance(value, Mapping) and isinstance(value.get("label"), Sequence):
        return [str(name) for name in value["label"]]
    return None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f'choices must be a list such as ["yes", "no"], not {text[:40]!r}') from error


def read_answer(value: Any, choices: Sequence[str], labels: Sequence[str] | None = None, *, first: int = 0) -> int:
    """Which choice a record names as right, counted from 0.

    By the record's own name of the choice; by its number, where it is one; by its text; by its number as text; or by
    its letter (A, B, ...), in this order.

    Args:
        labels: the record's own names of the choices, such as ["1", "2", "3"].
        first: number of the first choice.
    Raises:
        UserError: none of these.
    """
    text = "" if value is None else str(value).strip()
    if labels is not None and text in labels:
        return list(labels).index(text)
    if isinstance(value, int) and 0 <= value - first < len(choices):  # false and true too
        return int(value) - first
    if text in choices:
        return list(choices).index(text)
    if text.isdecimal() and 0 <= int(text) - first < len(choices):
        return int(text) - first
    letter = ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if 0 <= letter < len(choices):
        return letter
    raise UserError(
        f"the answer {text!r} is none of the {len(choices)} choices: it is the choice's number (from {first}, see "
        f"data.first_choice), its letter or its text"
    )


def collate_choices(questions: Sequence[Question], pad: int) -> dict[str, Tensor]:
    """A batch of questions.

    Returns:
        input_ids, attention_mask, choice_labels: int64 (R, T), a row for each choice of each question, one question
        after the other; choice_labels is -100 but on the choice's tokens. choice_of: int64 (R, 2), question and number
        of the choice. choice_bytes: int64 (R,).
    """
    rows = []
    places = []
    for number, question in enumerate(questions):
        for choice, (tokens, count) in enumerate(question.sequences):
            learnt = np.zeros(len(tokens), bool)
            learnt[len(tokens) - count :] = True
            rows.append((np.array(tokens), learnt))
            places.append((number, choice))
    batch = collate(rows, pad)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "choice_labels": batch["labels"],
        "choice_of": torch.tensor(places),
        "choice_bytes": torch.tensor([size for question in questions for size in question.sizes]),
    }
