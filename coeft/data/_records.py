"""Records that are typed or lie in files, for predictions."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coeft.data._source import Split
from coeft.data._tables import SUFFIXES, read_table
from coeft.errors import UserError, near


def is_file(text: str) -> bool:
    """Whether an argument names a table, not text itself: it ends as one and has no line break.

    Raises:
        UserError: it does, but there is no such file.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() not in SUFFIXES or "\n" in text:
        return False
    if not path.is_file():
        raise UserError(f"{text}: no such file")
    return True


def table_records(text: str) -> list[dict[str, Any]]:
    """All rows of a file as column -> value.

    Raises:
        UserError: it cannot be read as a table.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_table(path).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{text}: not a Parquet file, or a damaged one ({error})") from error
    return read_table(path, {}, {}, dict, key="INPUT").values


def column_of(records: Sequence[dict[str, Any]], wanted: Iterable[str], where: str) -> str:
    """The first of these columns that the records have.

    Raises:
        UserError: none is there.
    """
    there = list(dict.fromkeys(key for record in records for key in record))
    wanted = list(dict.fromkeys(wanted))
    for column in wanted:
        if column in there:
            return column
    raise UserError(f"{where} has no column {' or '.join(map(repr, wanted))}; {near(wanted[0], there)}")


def unlabelled(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Split:
    """Records to predict."""
    return Split(items=list(records), labels=np.full(len(records), -1, np.int64), names=list(names))
