"""Rows of a table (CSV, TSV, JSONL, Parquet): a text, a pair of texts or the file of an image in each, and a label.

`path` is one file, or a folder with train, val and test as files (`train.csv`, `test.csv`). Of one file, all rows are
the training split, or `split_column` says the split of each; `splits.val` and `splits.test` may name other files. Line
breaks, a mark of the encoding and empty lines are as they come; the encoding is UTF-8. Every row that cannot be used
is named by its line before training begins.

The label is a word or number for one class a row; a list, or text with `label_separator`, or several columns of 0 and 1
for several; a number for regression. Classes are those of the training split, sorted.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from coeft.data._settings import AUTO, PARTS, RowData, choose_splits, is_columns, required, text_fields
from coeft.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from coeft.data._rows import Read
    from coeft.data._source import Source


@dataclass(frozen=True, kw_only=True)
class Table(RowData):
    """Columns of a file."""

    kind: str = "table"
    splits: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(PARTS, AUTO))
    """train, val, test -> file in a folder, value of split_column, or another file; auto: that of a usual name."""
    path: str = MISSING
    """FILE.csv, .tsv, .jsonl or .parquet, or a folder with such files."""
    split_column: str | None = None
    """Column with the name of each row's split; null is none."""
    input: Any = "text"
    """Column of the text, or a list of two for pairs; for models of images, column of the file's name, relative to the
    table."""
    pair: str | None = None
    """Column of the second text of a pair; the same as a list of two in `input`."""
    label: Any = "label"
    """Column of the label; a list of columns of 0 and 1 for several labels a row."""
    prompt: str | None = None
    """For language models: column of what is given."""
    completion: str | None = None
    """For language models: column of what is learnt."""
    messages: str | None = None
    """For language models: column of chats, lists of {"role", "content"}."""
    choices: Any = None
    """For multiple choice: column of the lists of choices, or a list of columns with one choice each; `input` is the
    column of the question, `label` of the right choice: its number, its letter or its text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_columns(self.input) or (isinstance(self.input, list) and len(self.input) > 2):
            raise UserError(f"data.input must be the name of a column, or a list of two, not {self.input!r}")
        if self.pair is not None and not isinstance(self.input, str):
            raise UserError("data.pair and a list in data.input both name the second text; set data.pair=null")
        if not is_columns(self.label):
            raise UserError(f"data.label must be the name of a column, or a list of columns, not {self.label!r}")
        if self.choices is not None and not is_columns(self.choices):
            raise UserError(f"data.choices must be the name of a column, or a list of columns, not {self.choices!r}")

    def fields(self, modality: str, target: str) -> dict[str, tuple[str, str]]:
        texts: list[Any] = [self.input, self.pair] if isinstance(self.input, str) else [*self.input, None]
        if modality == "image":
            if texts[1] is not None:
                raise UserError("data.input names two columns, but the backbone takes one image; name one")
            return {"image": (texts[0], "data.input")}
        return text_fields(
            target,
            text=(texts[0], "data.input"),
            pair=(texts[1], "data.pair" if self.pair is not None else "data.input"),
            prompt=(self.prompt, "data.prompt"),
            completion=(self.completion, "data.completion"),
            messages=(self.messages, "data.messages"),
            choices=(self.choices, "data.choices"),
        )

    def check(self) -> None:
        from pathlib import Path

        from coeft.data._tables import check_file, table_files

        path = Path(required("data.path", self.path, "FILE"))
        others = self._others(path)
        if path.is_dir():
            table_files(path)
        elif any(self.split_name(part) is not None for part in PARTS if part not in others):
            check_file(path, "data.path")
        for part, file in others.items():
            check_file(file, f"data.splits.{part}")

    def load(self, seed: int, group: str | None = None, *, modality: str = "text", target: str = "class") -> "Source":
        from pathlib import Path

        from coeft.data._rows import Reader, parted
        from coeft.data._tables import Files, table_files

        path = Path(required("data.path", self.path, "FILE"))
        reader = Reader(
            self.fields(modality, target),
            label=self.label,
            label_key="data.label",
            target=target,
            separator=self.label_separator,
            group=group,
            split=self.split_column,
            first_choice=self.first_choice,
        )
        files = Files(reader)
        others = self._others(path)
        parts: dict[str, Read | None] = dict.fromkeys(PARTS)
        rest = [part for part in PARTS if part not in others and self.split_name(part) is not None]
        if path.is_dir():
            inside = table_files(path)
            chosen = choose_splits(self, list(inside), source=f"data.path={path}", parts=rest)
            for part, name in chosen.items():
                parts[part] = None if name is None else files.read(inside[name], "data.path")
        elif rest and (read := files.read(path, "data.path")) is not None:
            if self.split_column is None:
                self._one_file(path, rest)
                parts["train"] = read if "train" in rest else None
            else:
                names = sorted({str(row.split) for row in read.rows})
                source = f"column {self.split_column!r} of {path}"
                parts |= parted(read, choose_splits(self, names, source=source, parts=rest))
        reader.split = None  # another file is one split as a whole
        for part, file in others.items():
            parts[part] = files.read(file, f"data.splits.{part}")
        files.check()
        if parts["train"] is None:
            raise UserError("data.splits.train is null: there is nothing to train on")
        return reader.source(parts, on_error=self.on_error)

    def _others(self, path: "Path") -> "dict[str, Path]":
        """train, val, test -> the file that it names: as it is found from here, else beside the main file or in it."""
        from pathlib import Path

        from coeft.data._tables import is_table

        others = {}
        for part in PARTS:
            name = self.split_name(part)
            if name is None or not is_table(Path(name)):
                continue
            given = Path(name).expanduser()
            beside = (path if path.is_dir() else path.parent) / given
            others[part] = beside if not given.exists() and beside.exists() else given
        return others

    def _one_file(self, path: "Path", rest: list[str]) -> None:
        """Refuse names of splits in a file that has none."""
        for part in rest:
            name = self.split_name(part)
            if name != AUTO:
                raise UserError(
                    f"data.splits.{part}={name}: {path} has no splits; name another file, or the column that says the "
                    "split of each row by data.split_column"
                )
