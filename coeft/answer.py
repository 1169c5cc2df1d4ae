"""Answers of a finished language model: to one prompt as a stream, to many as rows."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeft.assemble import encoder, restore, set_threads
from coeft.data._chat import Prompt
from coeft.data._records import column_of, is_file, table_records
from coeft.errors import UserError
from coeft.generate import Decoding, Teller, generate, readable
from coeft.run import Run

OUTPUTS = (".csv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user asks of the text; None is the run's own."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def answer(run: Run, inputs: Sequence[str], out: Path | None, *, fold: int | None, wishes: Wishes) -> None:
    """Continue prompts with a run's model, greedily unless a temperature is asked for.

    A single prompt, and every line of standard input, is answered at once, word by word, on standard output; several
    prompts, or the rows of tables, become rows (input, generated) of `out`, or of standard output as CSV.

    Args:
        inputs: prompts, tables (.csv, .tsv, .jsonl, .parquet) with the run's column of prompts or chats, or "-".
        out: a file that does not exist, .csv or .jsonl.
        fold: which model of a cross-validation without a refit.
    Raises:
        UserError: no such fold, or none was chosen; an input cannot be used; `out` is not to be written.
    """
    if out is not None and out.suffix.lower() not in OUTPUTS:
        raise UserError(f"--out: {out} must end in {' or '.join(OUTPUTS)}")
    limit = wishes.max_new_tokens if wishes.max_new_tokens is not None else run.config.task.max_new_tokens
    decoding = Decoding(max_new_tokens=limit, temperature=wishes.temperature, top_p=wishes.top_p, seed=wishes.seed)
    adapter = run.adapter(fold)
    at_once = out is None and (list(inputs) == ["-"] or (len(inputs) == 1 and not is_file(inputs[0])))
    records = [] if at_once else list(_records(run, inputs))
    set_threads(run.config)
    built, _ = restore(run.config, adapter)
    rows: Any = encoder(run.config, built.backbone)
    speaker = _Speaker(built.backbone, rows.renderer, decoding)
    if at_once:
        for text in _lines() if inputs[0] == "-" else inputs:
            speaker.tell(_record(run.config.data.fields("text", "text"), text))
        return
    prompts = []
    for name, record in records:
        try:
            prompts.append(rows.renderer.prompt(record))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    texts = speaker.answers(prompts, run.config.trainer.micro_batch_size or run.config.data.batch_size)
    _write([(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)], out)


class _Speaker:
    """A model with its tokenizer."""

    def __init__(self, backbone: Any, renderer: Any, decoding: Decoding) -> None:
        self.backbone, self.renderer, self.decoding = backbone, renderer, decoding
        self.tokenizer = backbone.tokenizer
        self.stops = renderer.stop_tokens()
        pad = self.tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else renderer.eos)

    def tell(self, record: dict[str, Any]) -> None:
        """Write the answer to one prompt on standard output as it comes, and end the line."""

        def decode(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()

        def write(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        teller = Teller(decode, write, self.stops)
        prompt = self.renderer.prompt(record)
        generate(
            self.backbone.model,
            [prompt.input_ids],
            stops=self.stops,
            pad=self.pad,
            decoding=self.decoding,
            watch=teller,
        )
        teller.end()
        write("\n")

    def answers(self, prompts: Sequence[Prompt], batch_size: int) -> list[str]:
        """The answers to several prompts."""
        found = generate(
            self.backbone.model,
            [prompt.input_ids for prompt in prompts],
            stops=self.stops,
            pad=self.pad,
            decoding=self.decoding,
            batch_size=batch_size,
        )
        return [readable(self.tokenizer, made.tokens) for made in found]


def _record(fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A typed prompt as the run's records are: the user's message of a chat, a prompt, or the beginning of a text."""
    if "messages" in fields:
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text}


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def _records(run: Run, inputs: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of every prompt."""
    fields = run.config.data.fields("text", "text")
    kind = "messages" if "messages" in fields else "prompt"
    own, _ = fields.get(kind) or fields["text"]
    for text in inputs:
        if text == "-":
            yield from ((f"line {number}", _record(fields, line)) for number, line in enumerate(_lines(), 1))
        elif is_file(text):
            found = table_records(text)
            column = column_of(found, [own, "messages", "prompt", "input"], text)
            chats = column == "messages" or (kind == "messages" and column == own)
            for number, record in enumerate(found, 1):
                value = record.get(column)
                name = f"{text}, row {number}"
                if value is None or not len(value):
                    raise UserError(f"{name}: no value in column {column!r}")
                yield name, {"messages": value} if chats else _record(fields, str(value))
        else:
            yield repr(text[:40]), _record(fields, text)


def _write(rows: list[tuple[str, str]], out: Path | None) -> None:
    """Rows (input, generated) as CSV or JSONL."""
    if out is None:
        csv.writer(sys.stdout).writerows([("input", "generated"), *rows])
        return
    try:
        with out.open("x", newline="", encoding="utf-8") as file:
            if out.suffix.lower() == ".csv":
                csv.writer(file).writerows([("input", "generated"), *rows])
            else:
                for given, made in rows:
                    file.write(json.dumps({"input": given, "generated": made}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror})") from error
