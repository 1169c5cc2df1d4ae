"""What a finished run, fold, suite or sweep came to, read from its folder, and who is told of it."""

import csv
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from coeft.config import TrainConfig, to_yaml
from coeft.loggers._steady import Steady

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger("coeft")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns by name and rows of plain values, None where there is none."""

    columns: list[str]
    rows: list[list[Any]]

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "Table":
        """A table of rows by name; values that are lists, such as per class, are left out."""
        kept = [{key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in rows]
        columns = list(dict.fromkeys(key for row in kept for key in row))
        return cls(columns=columns, rows=[[row.get(column) for column in columns] for row in kept])

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        cells = [["" if value is None else str(value).replace("|", "\\|") for value in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def csv(self) -> str:
        """The table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Figures, tables and numbers of a folder."""

    folder: Path
    pictures: dict[str, Path] = field(default_factory=dict)
    """Name -> PNG file."""
    tables: dict[str, Table] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    """Of results.json, nested names joined by a slash."""
    files: list[Path] = field(default_factory=list)
    """JSON and CSV files that say the same in full."""
    adapter: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> "Findings":
        """What stands in the folder of a run, a fold, a suite or a sweep."""
        tables: dict[str, Table] = {}
        numbers: dict[str, float] = {}
        results = folder / "results.json"
        if results.is_file():
            values = json.loads(results.read_text(encoding="utf-8"))
            numbers = _numbers(values)
            if "folds" in values:
                tables["folds"] = Table.of(values["folds"])
            if "members" in values:
                tables["members"] = Table.of([{"run": name, **row} for name, row in values["members"].items()])
            if "groups" in values:
                rows = [
                    *values["groups"].items(),
                    ("mean of the groups", values["over_groups"]),
                    ("all runs", values["over_runs"]),
                ]
                tables["groups"] = Table.of([{"group": name, **row} for name, row in rows])
        elif (folder / "fold.json").is_file():
            fold = json.loads((folder / "fold.json").read_text(encoding="utf-8"))
            tables["folds"] = Table.of([fold["row"]])
            numbers = _numbers({key: fold[key] for key in ("row", "validation", "heldout", "test") if fold.get(key)})
        if (folder / "trials.csv").is_file():
            with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
                tables["trials"] = Table.of([{k: v or None for k, v in row.items()} for row in csv.DictReader(file)])
        names = ("results.json", "fold.json", "metrics.csv", "trials.csv", "best.yaml")
        return cls(
            folder=folder,
            pictures={path.stem: path for path in sorted((folder / "plots").glob("*.png"))},
            tables=tables,
            numbers=numbers,
            files=[folder / name for name in names if (folder / name).is_file()],
            adapter=folder / "adapter" if (folder / "adapter").is_dir() else None,
        )


def _numbers(values: Mapping[str, Any], inside: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{inside}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[inside + key] = value
    return found


def publish(cfg: TrainConfig, folder: Path) -> None:
    """Tell the loggers of a suite or a sweep, which trains nothing itself."""
    Boards(cfg, folder).publish(folder)


def finish(cfg: TrainConfig, folder: Path) -> None:
    """Write the tables of a complete run whose process was killed right before them; nothing is sent anywhere."""
    if getattr(cfg.logger, "kind", None) == "csv":
        publish(cfg, folder)


class Boards:
    """The loggers of one run besides metrics.csv: one set for each fold and one for the whole.

    Each stays open from the first step until its figures and tables are there, which is after training.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path) -> None:
        self.settings, self.run_dir = cfg.logger, run_dir
        self.config = yaml.safe_load(to_yaml(cfg))
        self.group, self.name = place_of(run_dir)
        self.loggers: dict[Path, list[Logger]] = {}

    def steady(self, folder: Path) -> list["Logger"]:
        """The loggers of a folder for training, which their failures do not stop."""
        return [Steady(logger) for logger in self.open(folder)]

    def open(self, folder: Path) -> list["Logger"]:
        """The loggers of a fold's folder, or of the run's own.

        Raises:
            UserError: a service refuses, and nothing of the run is trained yet.
        """
        if folder not in self.loggers:
            name = self.name if folder == self.run_dir else f"{self.name}/{folder.name}"
            # a class of the user's own may know neither groups nor figures
            extra = {"group": self.group} if self.group is not None and hasattr(self.settings, "publish") else {}
            self.loggers[folder] = self._build(name=name, config=self.config, **extra)
        return self.loggers[folder]

    def _build(self, **arguments: Any) -> list["Logger"]:
        try:
            return self.settings.build(self.run_dir, **arguments)
        except Exception as error:  # every service has errors of its own
            if not any((self.run_dir / name).is_file() for name in ("metrics.csv", "results.json")):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
        if hasattr(self.settings, "offline"):
            log.warning("%s; from here on the run is written offline", reason)
            self.settings = self.settings.offline()
            try:
                return self.settings.build(self.run_dir, **arguments)
            except Exception as error:
                reason = str(error)
        log.warning("logger: it cannot be opened (%s); training goes on without it", reason)
        return []

    @rank_zero_only
    def publish(self, folder: Path) -> None:
        """Add what stands in a folder, and end its loggers; what goes wrong is said, and does not undo the run."""
        if hasattr(self.settings, "publish"):
            try:
                self.settings.publish(self.open(folder), Findings.read(folder))
            except Exception as error:  # every service has errors of its own
                log.warning("logger: figures and tables of %s were not sent: %s", folder, error)
        self._end(folder)

    @rank_zero_only
    def close(self) -> None:
        """End the loggers of what was interrupted or failed."""
        for folder in list(self.loggers):
            self._end(folder, failed=True)

    def _end(self, folder: Path, *, failed: bool = False) -> None:
        for logger in self.loggers.pop(folder, []):
            try:
                experiment = getattr(logger, "experiment", None)
                if experiment is not None and hasattr(experiment, "finish"):  # wandb: the next fold is a run of its own
                    experiment.finish(**({"exit_code": 1} if failed else {}))
                else:
                    logger.finalize("failed" if failed else "success")
            except TimeoutError:
                log.warning(
                    "logger: not everything was sent in time; it stands in %s, `wandb sync` sends it later",
                    getattr(experiment, "dir", folder),
                )  # fmt: skip
            except Exception as error:
                log.warning("logger: %s did not end as it should (%s)", type(logger).__name__, error)


def place_of(run_dir: Path) -> tuple[str | None, str]:
    """What a run is shown together with, and its name there.

    The group is RECIPE/NAME of the sweep, or the name of the suite, that the run is part of; None if it is of neither.
    """
    run_dir = top = run_dir.absolute()
    if (top.parent / ".members").is_dir():
        top = top.parent
    if top.parent.name == "trials" and (top.parent.parent / "sweep.yaml").is_file():
        top = top.parent.parent
    if not (top / "sweep.yaml").is_file():
        return (None, run_dir.name) if top == run_dir else (top.name, run_dir.name)
    recipe = yaml.safe_load((top / "base.yaml").read_text(encoding="utf-8")).get("recipe")
    name = "/".join(run_dir.relative_to(top).parts[1:])  # without trials/
    return f"{recipe}/{top.name}" if recipe else top.name, name or "summary"
