"""Reading data sets with Hugging Face's `datasets`, also without a network."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coeft.data._rows import Read, Reader, Row
from coeft.data._settings import RowData
from coeft.data._source import Chosen, Source, Split
from coeft.errors import UserError, near

ANSWER_WITHIN = 4.0  # seconds for the Hub to answer, before only the local cache is asked
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_hub(
    name: str, *, config: str | None, revision: str | None, cache_dir: str | None, ways: str
) -> Mapping[str, Any]:
    """Split name -> table of a data set on the Hub, in its cache, or in a local folder or file.

    Args:
        ways: what a user without network can do instead, the end of the error message.

    Raises:
        UserError: it does not exist, cannot be reached, or cannot be read.
    """
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "~", "/")) or path.suffix in FILE_READERS or name.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"data.name={name}: no such file or folder")
    if path.exists():
        return _load_local(path, config=config, cache_dir=cache_dir)

    unreachable = _ask_hub(name, revision)
    import datasets

    try:
        if unreachable is None:
            return datasets.load_dataset(name, config, revision=revision, cache_dir=cache_dir)
        with _offline():
            return datasets.load_dataset(name, config, revision=revision, cache_dir=cache_dir)
    # `datasets` raises whatever its parts raise; all of it is about this data set.
    except Exception as error:
        wanted = f"data set {name}" + (f", configuration {config}" if config else "")
        wanted += f", revision {revision}" if revision else ""
        if unreachable is None:
            raise UserError(f"the {wanted} cannot be loaded: {_short(error)}") from error
        raise UserError(
            f"the {wanted} is not in the local cache, and the Hugging Face Hub cannot be reached ({unreachable}): "
            f"run once with a network, or {ways}"
        ) from None


def _load_local(path: Path, *, config: str | None, cache_dir: str | None) -> Mapping[str, Any]:
    import datasets

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it says, the error says too
    try:
        if path.is_file():
            reader = FILE_READERS.get(path.suffix.lower())
            if reader is None:
                raise UserError(
                    f"data.name={path}: not a file of {', '.join(FILE_READERS)}; give a folder or such a file"
                )
            return datasets.load_dataset(reader, data_files=str(path), cache_dir=cache_dir)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        return datasets.load_dataset(str(path), config, cache_dir=cache_dir)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.name={path} cannot be read as a data set: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The cause that a user can do something about, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _ask_hub(name: str, revision: str | None) -> str | None:
    """Why the Hub cannot be reached, or None if it has this data set.

    Raises:
        UserError: the Hub answered that there is no such data set or revision, or that it may not be read.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, revision=revision, timeout=ANSWER_WITHIN)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread of its own, since looking up a name can take longer than any timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN)
    if not outcome:
        return f"no answer within {ANSWER_WITHIN:g} seconds"
    error = outcome[0]
    if isinstance(error, GatedRepoError):
        raise UserError(f"the data set {name} is gated: ask for access on its page, then `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        raise UserError(f"the data set {name} has no revision {revision!r}")
    if isinstance(error, RepositoryNotFoundError):
        raise UserError(f"the Hugging Face Hub has no data set {name!r} (or it is private); names are OWNER/NAME")
    return None if error is None else _short(error)


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its cache only; it reads the environment at import, too early for us."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@dataclass(frozen=True)
class EncodedImages(Sequence):
    """A column of images that are not decoded: the bytes of each, or its file."""

    table: Any
    column: str
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        value = self.table[int(index)][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise UserError(f"split {self.name}, row {index}: column {self.column} is empty; remove the row")
        return Path(value["path"]) if value["bytes"] is None else value["bytes"]


def read_splits(
    tables: Mapping[str, Any],
    chosen: dict[str, str | None],
    *,
    image: str,
    label: str,
    group: str | None,
    keys: tuple[str, str],
) -> tuple[dict[str, Split | None], list[str]]:
    """The splits called train, val and test by `chosen`, and the class names of the training split.

    Args:
        keys: settings that name the columns, for messages.

    Raises:
        UserError: a column is missing or of a wrong type, or a label is missing or unknown to the training split.
    """
    classes: list[str] = []
    splits: dict[str, Split | None] = {}
    for part, name in chosen.items():
        if name is None:
            splits[part] = None
            continue
        table = tables[name]
        for key, column in zip((*keys, "cv.group"), (image, label, group), strict=True):
            if column is not None and column not in table.column_names:
                raise UserError(f"{key}={column}: split {name} has no such column; {near(column, table.column_names)}")
        values, names = _labels(table, label, name)
        if part == "train":
            classes = names
        position = {class_name: index for index, class_name in enumerate(classes)}
        for row, value in enumerate(values):
            if value not in position:
                raise UserError(
                    f"split {name}, row {row}: label {value!r} is not among the classes of the training split; "
                    f"{near(value, classes)} Unlabelled? data.splits.{part}=null"
                )
        splits[part] = Split(
            items=EncodedImages(_encoded(table, image, keys[0]), image, name),
            labels=np.array([position[value] for value in values], np.int64),
            names=[f"{name}[{row}]" for row in range(len(values))],
            groups=None if group is None else _groups(table, group, name),
        )
    return splits, classes


@dataclass(frozen=True)
class TextRows(Sequence):
    """What a model gets of each row: name -> value."""

    table: Any
    keep: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[int(index)]
        return {name: row[column] for name, column in self.keep.items()}


@dataclass(frozen=True)
class RowNames(Sequence):
    """SPLIT[row], made when asked for."""

    split: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return f"{self.split}[{int(index)}]"


def read_rows(
    tables: Mapping[str, Any], chosen: dict[str, str | None], settings: RowData, *, group: str | None, target: str
) -> Source:
    """The splits called train, val and test by `chosen`, of a data set of text.

    Raises:
        UserError: a column is missing, or rows cannot be used.
    """
    import datasets

    columns: Any = getattr(settings, "columns")  # noqa: B009 (of the hub's settings alone)
    reader = Reader(
        settings.fields("text", target),
        label=columns.label,
        label_key="data.columns.label",
        target=target,
        separator=settings.label_separator,
        group=group,
        first_choice=settings.first_choice,
    )
    parts: dict[str, Read | None] = dict.fromkeys(chosen)
    classes: list[str] | None = None
    for part, name in chosen.items():
        if name is None:
            continue
        table = tables[name]
        lacking = [
            f"{key}={column}: split {name} has no such column; {near(column, table.column_names)}"
            for column, key in reader.columns.items()
            if column not in table.column_names
        ]
        if lacking:
            raise UserError("\n".join(lacking))
        feature = table.features.get(reader.label)
        names = feature.names if isinstance(feature, datasets.ClassLabel) and target == "class" else None
        if part == "train":
            classes = None if names is None else list(names)
        parts[part] = _visited(table.select_columns(list(reader.columns)), name, reader, names)
    return reader.source(parts, classes, on_error=settings.on_error)


def _visited(table: Any, split: str, reader: Reader, class_names: list[str] | None) -> Read:
    """All rows of a split, looked at once."""
    rows: list[Row] = []
    bad: list[str] = []
    good: list[int] = []
    for number, record in enumerate(table):
        try:
            if class_names is not None:
                record = {**record, reader.label: _class_name(record[reader.label], reader.label, class_names)}
            rows.append(reader.visit(record))
            good.append(number)
        except ValueError as error:
            bad.append(f"{split}[{number}]: {error}")
    kept = np.array(good, np.int64)
    names = Chosen(RowNames(split, len(table)), kept)
    items = Chosen(TextRows(table, reader.keep), kept)
    return Read(where=f"split {split}", items=items, names=names, rows=rows, bad=bad)


def _class_name(label: Any, column: str, names: Sequence[str]) -> str:
    if label is None or not 0 <= label < len(names):
        raise ValueError(f"column {column!r} has no label (unlabelled? data.splits.test=null)")
    return names[label]


def _labels(table: Any, column: str, split: str) -> tuple[list[str], list[str]]:
    """The class name of each row, and all class names in the order of their labels.

    Raises:
        UserError: a row has no label, or labels are neither class labels, integers nor text.
    """
    import datasets

    feature = table.features[column]
    values = table[column][:]
    for row, value in enumerate(values):
        if value is None or (isinstance(feature, datasets.ClassLabel) and value < 0):
            raise UserError(f"split {split}, row {row}: column {column} has no label; remove the row or the split")
        if isinstance(value, bool) or not isinstance(value, int | str):
            kind = type(value).__name__
            raise UserError(
                f"split {split}, row {row}: column {column} holds {kind}; expected class labels, int or text"
            )
    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[value] for value in values], list(feature.names)
    return [str(value) for value in values], [str(value) for value in sorted(set(values))]


def _groups(table: Any, column: str, split: str) -> np.ndarray:
    values = table[column][:]
    for row, value in enumerate(values):
        if value is None or value == "":
            raise UserError(f"split {split}, row {row}: column {column} (cv.group) is empty")
    return np.array([str(value) for value in values], dtype=object)


def _encoded(table: Any, column: str, key: str) -> Any:
    """The table with this column alone, as undecoded images.

    Raises:
        UserError: the column holds something else.
    """
    import datasets

    feature = table.features[column]
    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception:
        images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        hint = f"; columns of images: {', '.join(images)}" if images else ""
        raise UserError(f"{key}={column} holds {feature}, no images{hint}") from None
