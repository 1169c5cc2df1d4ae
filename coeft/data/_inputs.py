"""Texts to predict: rows of tables, lines of standard input, and texts as they are typed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coeft.data._rows import Reader
from coeft.data._settings import RowData
from coeft.data._source import Split
from coeft.data._tables import Files, is_table
from coeft.errors import UserError


@dataclass(frozen=True)
class _Joined(Sequence):
    """Several sequences, one after the other."""

    parts: list[Sequence[Any]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class _Shown(Sequence):
    """What the column `input` of the predictions shows of each record."""

    items: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return " | ".join(str(value) for value in self.items[index].values())


def text_inputs(inputs: Sequence[str], settings: RowData, target: str, on_error: str) -> Split:
    """Records of text, named by the text itself; labels are -1.

    Args:
        inputs: tables, whose columns are called as in training; "-" for standard input, a text or a JSON object with
            these columns on each line; anything else is a text.
        settings: of the run's data.
        target: what the run's task learns.

    Raises:
        UserError: a table cannot be read, a row or line is no text, or there is none at all.
    """
    fields = settings.fields("text", target)
    reader = Reader(fields, label="", label_key="", target="text")
    files = Files(reader)
    parts: list[Sequence[dict[str, Any]]] = []
    problems: list[str] = []
    for given in inputs:
        path = _path(given)
        if given == "-":
            parts.append(_lines(reader, problems))
        elif path is not None and is_table(path):
            if (read := files.read(path, "INPUT")) is not None:
                parts.append(read.items)
                problems += [f"{path.parent / line}" if on_error == "raise" else line for line in read.bad]
        elif path is not None:
            raise UserError(
                f"{given} is a file, but not a table (.csv, .tsv, .jsonl, .parquet); its lines: - < {given}"
            )
        elif len(fields) > 1:
            columns = " and ".join(repr(column) for column, _ in fields.values())
            raise UserError(f"the model takes pairs of texts: give a table with the columns {columns}, not {given!r}")
        elif not given.strip():
            problems.append(f"{given!r}: the text is empty")
        else:
            parts.append([{"text": given}])
    files.check()
    if problems and on_error == "raise":
        raise UserError(
            "\n".join([f"{len(problems)} inputs cannot be used:", *(f"  {line}" for line in problems[:10])])
        )
    items = _Joined(parts)
    if not len(items):
        raise UserError("nothing to predict: give texts, a table, or - for standard input")
    return Split(items=items, labels=np.full(len(items), -1, np.int64), names=_Shown(items))


def _path(given: str) -> Path | None:
    """The table or other file that an input names, None for a text."""
    try:
        path = Path(given).expanduser()
        return path if is_table(path) or path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such user's home, a character of no name
        return None


def _lines(reader: Reader, problems: list[str]) -> list[dict[str, Any]]:
    """The records of standard input."""
    records = []
    for number, line in enumerate(sys.stdin, 1):
        if not (text := line.strip()):
            continue
        try:
            record = _record(text, reader)
            reader.visit(record)
        except ValueError as error:
            problems.append(f"standard input, line {number}: {error}")
            continue
        records.append({name: record[column] for name, column in reader.keep.items()})
    return records


def _record(text: str, reader: Reader) -> dict[str, Any]:
    """A line as a row: a JSON object, or the text itself where the model takes one."""
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and set(reader.columns) <= set(found):
            return found
    if len(reader.keep) > 1:
        raise ValueError(
            f"the model takes pairs: a JSON object with {', '.join(map(repr, reader.columns))} on each line"
        )
    return dict.fromkeys(reader.columns, text)
