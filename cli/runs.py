"""coeft list runs: the runs, suites and sweeps below a folder."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError

from .arguments import write_rows

if TYPE_CHECKING:
    from coeft.report.folders import State

SORTS = ("run", "status", "metric", "value", "trained", "size", "time")
HEADER = ("run", "status", "metric", "value", "trained", "size", "written")
RIGHT = (4, 5)


def show(arguments: argparse.Namespace) -> int:
    """Print the table, its first line the names of the columns."""
    from coeft.report.folders import find, state

    folder, parts = _split(arguments.filter)
    found = [state(each) for each in find(folder)] if folder.is_dir() else []
    rows = [each for each in found if all(part in str(each.path) or part == each.metric for part in parts)]
    if arguments.status:
        rows = [each for each in rows if (each.status == "completed") == (arguments.status == "completed")]
    if not rows:
        if arguments.filter or arguments.status:
            raise UserError(f"no runs in {folder}/ match: {len(found)} there" if found else f"no runs in {folder}/")
        raise UserError("no runs in runs/; give the folder to look in")
    sort = arguments.sort or "run"
    rows.sort(key=lambda each: _key(each, sort))
    known = [each for each in rows if sort == "run" or _field(each, sort) is not None]
    if arguments.reverse:
        known.reverse()
    rows = known + [each for each in rows if each not in known]  # what is unknown stays last
    write_rows([HEADER, *map(_row, rows)], RIGHT)
    return 0


def _split(words: list[str]) -> tuple[Path, list[str]]:
    """The folder to look in, and parts of names that the runs must have: FOLDER, FILTER, or both."""
    if words and (Path(words[0]).expanduser().is_dir() or "/" in words[0]):
        folder = Path(words[0]).expanduser()
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        return folder, words[1:]
    return Path("runs"), words


def _field(each: "State", sort: str) -> Any:
    return getattr(each, sort)


def _key(each: "State", sort: str) -> tuple[Any, ...]:
    if sort == "run":
        return (str(each.path),)
    value = _field(each, sort)
    return (value is None, 0 if value is None else value, str(each.path))


def _row(each: "State") -> tuple[str, ...]:
    value = "" if each.value is None else f"{each.value:.4f}"
    if value and each.std is not None:
        value += f" ± {each.std:.4f}"
    kind = "" if each.kind == "run" else f" {each.kind}"
    return (
        str(each.path),
        each.status + kind,
        each.metric or "",
        value,
        "" if each.trained is None else f"{each.trained:,}",
        human(each.size),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(each.time)) if each.time else "",
    )


def human(size: int) -> str:
    """Bytes as 512 B, 3.4 MB and so on, in powers of 1000."""
    if size < 1000:
        return f"{size} B"
    amount = float(size)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 999.5:
            return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
    return f"{amount / 1000:.1f} TB"
