"""RUN/metrics.csv, which every run writes, and the tables beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from coeft.loggers._findings import Findings


@dataclass(frozen=True, kw_only=True)
class Csv:
    """No logger besides metrics.csv."""

    kind: str = "csv"

    def build(self, run_dir: Path, name: str, config: dict[str, Any], group: str | None = None) -> list["Logger"]:
        """No further loggers: training writes metrics.csv itself."""
        return []

    def publish(self, loggers: list["Logger"], found: "Findings") -> None:
        """Write RUN/folds.csv, of a suite members.csv and groups.csv; the pictures stand in RUN/plots already."""
        from coeft.run import write_text

        for name, table in found.tables.items():
            if name != "trials" and (found.folder / "results.json").is_file():
                write_text(found.folder / f"{name}.csv", table.csv())
