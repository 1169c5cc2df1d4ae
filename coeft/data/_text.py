"""Texts, or pairs of texts, to the tokens of a model that classifies or measures them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coeft.data._tokens import Padding, Record, TextEncoder, Tokens
from coeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LENGTH = 512  # tokens, where the model allows more and nothing is said
NO_LIMIT = 10**9  # a tokenizer that does not know its model's limit says some such number


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of all that decides what a tokenizer gives: its class, its tables, its special tokens, the versions."""
    import tokenizers
    import transformers

    digest = hashlib.blake2b(digest_size=16)
    versions = (transformers.__version__, tokenizers.__version__)
    special = sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items())
    template = getattr(tokenizer, "chat_template", None)
    digest.update(repr((type(tokenizer).__name__, versions, special, template)).encode("utf-8", "surrogatepass"))
    if tokenizer.is_fast:
        tables = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
            tables.pop(state, None)
        digest.update(json.dumps(tables, sort_keys=True).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def length_limit(tokenizer: "PreTrainedTokenizerBase", wanted: int | None) -> int:
    """Tokens that a row may have: `data.max_length`, or the tokenizer's own limit, at most 512.

    Raises:
        UserError: more is wanted than the tokenizer's model takes, or too few for any text.
    """
    own = int(min(tokenizer.model_max_length, NO_LIMIT))
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if wanted is None:
        return min(own, DEFAULT_LENGTH)
    if wanted > own:
        raise UserError(f"data.max_length={wanted} is more than the {own} tokens that the model takes; lower it")
    if wanted <= special:
        raise UserError(
            f"data.max_length={wanted} leaves no room for text: the tokenizer itself adds up to {special} tokens"
        )
    return wanted


def padding_of(tokenizer: "PreTrainedTokenizerBase", *, multiple_of: int = 1) -> Padding:
    """How this tokenizer's rows are padded; a tokenizer without a pad token fills with its end token."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Padding(
        pad_id=int(pad_id or 0),
        side=tokenizer.padding_side,
        type_id=int(getattr(tokenizer, "pad_token_type_id", 0) or 0),
        multiple_of=multiple_of,
    )


def column_encoder(data: Any, backbone: Any, target: str) -> "ColumnEncoder":
    """The encoder of a backbone of text for data with columns.

    Raises:
        UserError: the data names no column of text, or data.max_length does not fit the tokenizer.
    """
    return ColumnEncoder(
        backbone.tokenizer,
        list(data.fields("text", target)),
        max_length=length_limit(backbone.tokenizer, data.max_length),
        multiple_of=data.pad_multiple,
    )


class ColumnEncoder(TextEncoder):
    """One or two columns of text with the tokenizer's special tokens.

    What is longer than the limit is cut at its end; of a pair, one token after another of the longer text.

    Args:
        columns: one name, or two for a pair.
        max_length: tokens of a row, the special ones included; as `length_limit` gives it.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", columns: Sequence[str], *, max_length: int, multiple_of: int = 1
    ) -> None:
        self.tokenizer = tokenizer
        self.columns = list(columns)
        self.max_length = max_length
        self.padding = padding_of(tokenizer, multiple_of=multiple_of)
        self.identity = repr(("text", tokenizer_identity(tokenizer), len(self.columns), max_length))

    def rows(self, records: Sequence[Record]) -> list[Tokens]:
        # Threads of the tokenizer end before any process is forked for loading, so nothing is lost by them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        texts = [[str(record[column]) for record in records] for column in self.columns]
        rows = self._tokenise(texts, truncation=False)
        long = [row for row, (ids, _) in enumerate(rows) if len(ids) > self.max_length]
        lengths = [len(rows[row][0]) for row in long]
        chosen = [[column[row] for row in long] for column in texts]
        if long:
            shorter = self._tokenise(chosen, truncation="longest_first", max_length=self.max_length)
            for row, short in zip(long, shorter, strict=True):
                rows[row] = short
        cut = {row: length - len(rows[row][0]) for row, length in zip(long, lengths, strict=True)}
        for ids, _ in rows:
            if not ids:
                raise ValueError("the tokenizer makes no token of the text")
        return [Tokens(ids, None, types, cut.get(row, 0)) for row, (ids, types) in enumerate(rows)]

    def _tokenise(self, texts: list[list[str]], **options: Any) -> list[tuple[list[int], list[int] | None]]:
        """Token ids and, if this tokenizer gives them, segments of each row."""
        made = self.tokenizer(*texts, return_attention_mask=False, verbose=False, **options)
        types = made["token_type_ids"] if "token_type_ids" in made else [None] * len(made["input_ids"])
        return list(zip(made["input_ids"], types, strict=True))
