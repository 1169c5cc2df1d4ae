"""TensorBoard event files in RUN/tensorboard, besides metrics.csv."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files; show them by `tensorboard --logdir RUN`."""

    kind: str = "tensorboard"

    def build(self, run_dir: Path, name: str, config: dict[str, Any]) -> list["Logger"]:
        """A logger into RUN/tensorboard/NAME, where name ends with the fold's folder for folds."""
        from lightning.pytorch.loggers import TensorBoardLogger

        return [TensorBoardLogger(run_dir / "tensorboard", name=name, version="", default_hp_metric=False)]
