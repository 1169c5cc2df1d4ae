"""A Hugging Face data set of text or images: by its name on the Hub, or a folder or file that `datasets` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from coeft.data._settings import AUTO, PARTS, RowData, choose_splits, is_columns, required, text_fields
from coeft.errors import UserError

if TYPE_CHECKING:
    from coeft.data._source import Source


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns."""

    image: str = "image"
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class RowColumns(Columns):
    """Names of the columns of data that may be text."""

    label: Any = "label"
    """A list of columns of 0 and 1 for several labels a row."""
    text: str = "text"
    pair: str | None = None
    """The second text of a pair."""
    prompt: str | None = None
    """For language models: what is given."""
    completion: str | None = None
    """For language models: what is learnt."""
    messages: str | None = None
    """For language models: chats, lists of {"role", "content"}."""
    choices: Any = None
    """For multiple choice: the lists of choices, or a list of columns with one choice each; `text` is the question,
    `label` the right choice: its number, its letter or its text."""

    def __post_init__(self) -> None:
        if not is_columns(self.label):
            raise UserError(f"data.columns.label must be the name of a column, or a list of them, not {self.label!r}")
        if self.choices is not None and not is_columns(self.choices):
            raise UserError(f"data.columns.choices must be the name of a column, or a list, not {self.choices!r}")


@dataclass(frozen=True, kw_only=True)
class Hub(RowData):
    """Any data set with columns of text or images, and labels (class labels, numbers, text, or lists of them)."""

    kind: str = "hub"
    splits: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(PARTS, AUTO))
    """train, val, test -> split of the data set; auto: the one of a usual name if there is one."""
    name: str = MISSING
    """Such as uoft-cs/cifar100, or a folder (class folders, parquet files, save_to_disk), or a parquet file."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    columns: RowColumns = field(default_factory=RowColumns)
    cache_dir: str | None = None
    """Where `datasets` keeps its files; null is its own choice."""

    def fields(self, modality: str, target: str) -> dict[str, tuple[str, str]]:
        columns = self.columns
        if modality == "image":
            return {"image": (columns.image, "data.columns.image")}
        return text_fields(
            target,
            text=(columns.text, "data.columns.text"),
            pair=(columns.pair, "data.columns.pair"),
            prompt=(columns.prompt, "data.columns.prompt"),
            completion=(columns.completion, "data.columns.completion"),
            messages=(columns.messages, "data.columns.messages"),
            choices=(columns.choices, "data.columns.choices"),
        )

    def check(self) -> None:
        self._tables()

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        from coeft.data._hub import read_rows, read_splits
        from coeft.data._source import Source

        tables, chosen = self._tables()
        if modality == "text":
            return read_rows(tables, chosen, self, group=group, target=target)
        if target != "class" or not isinstance(self.columns.label, str):
            raise UserError("data=hub has one class for each image, and the task needs something else; see data=table")
        splits, classes = read_splits(
            tables,
            chosen,
            image=self.columns.image,
            label=self.columns.label,
            group=group,
            keys=("data.columns.image", "data.columns.label"),
        )
        train = splits["train"]
        assert train is not None
        return Source(train=train, val=splits["val"], test=splits["test"], class_names=classes)

    def _tables(self) -> "tuple[Mapping[str, Any], dict[str, str | None]]":
        """The data set by split, and the splits that are used."""
        from coeft.data._hub import load_hub

        name = required("data.name", self.name, "NAME_OR_FOLDER")
        ways = "give a local copy: data.name=FOLDER (class folders or parquet files) or data.name=FILE.parquet"
        tables = load_hub(name, config=self.config, revision=self.revision, cache_dir=self.cache_dir, ways=ways)
        return tables, choose_splits(self, list(tables), source=f"data.name={name}")
