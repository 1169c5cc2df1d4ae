"""RUN/metrics.csv alone, which every run writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass(frozen=True, kw_only=True)
class Csv:
    """No logger besides metrics.csv."""

    kind: str = "csv"

    def build(self, run_dir: Path, name: str, config: dict[str, Any]) -> list["Logger"]:
        """No further loggers: training writes metrics.csv itself."""
        return []
