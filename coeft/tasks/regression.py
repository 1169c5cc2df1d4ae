"""Regression: one number a sample, by the mean squared error of numbers standardised over the training part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coeft.errors import UserError, near
from coeft.tasks._settings import TaskSettings

if TYPE_CHECKING:
    from coeft.tasks._task import Task

METRICS = ("loss", "mae", "mse", "pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class Regression(TaskSettings):
    """Settings of a regression run.

    The head's output is scaled by the mean and the standard deviation of the training part's numbers, so that what the
    model gives is in the units of the data; the adapter stores both.
    """

    kind: str = "regression"
    metric: str = "mse"
    """What picks the epoch and is reported: mse, mae, pearson, spearman, in the units of the data, or loss, the mean
    squared error in units of the training part's variance."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"task.metric: no metric {self.metric!r}; {near(self.metric, METRICS)}")

    @property
    def target(self) -> str:
        """What the labels are: one number a sample."""
        return "number"

    def outputs(self, class_names: Sequence[str]) -> int:
        """Width of the head."""
        return 1

    def build(self, num_outputs: int) -> "Task":
        """Loss and metrics."""
        from coeft.tasks._regression import RegressionTask

        return RegressionTask(metric=self.metric)
