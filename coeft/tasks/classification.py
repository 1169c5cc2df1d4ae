"""Single-label classification: cross entropy over the classes of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coeft.errors import UserError, near

if TYPE_CHECKING:
    from coeft.tasks._classification import ClassificationTask

METRICS = ("accuracy", "balanced_accuracy", "loss", "macro_f1", "top5")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Settings of a classification run."""

    kind: str = "classification"
    metric: str = "accuracy"
    """What picks the epoch and is reported: accuracy, balanced_accuracy, loss, macro_f1 or top5."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes in training, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"task.metric: no metric {self.metric!r}; {near(self.metric, METRICS)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing must be in [0, 1), not {self.label_smoothing}")

    @property
    def target(self) -> str:
        """What the labels are: one class a sample."""
        return "class"

    @property
    def head(self) -> str:
        """What the backbone ends in."""
        return "classifier"

    def outputs(self, class_names: Sequence[str]) -> int:
        """Width of the head.

        Raises:
            UserError: there are fewer than two classes.
        """
        if len(class_names) < 2:
            raise UserError(f"the data has {len(class_names)} class; classification needs two or more")
        return len(class_names)

    def build(self, num_outputs: int) -> "ClassificationTask":
        """Loss and metrics over so many classes."""
        from coeft.tasks._classification import ClassificationTask

        return ClassificationTask(num_outputs, metric=self.metric, label_smoothing=self.label_smoothing)
