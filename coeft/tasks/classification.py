"""Classification: one class a sample by cross entropy, or several by binary cross entropy of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError, near
from coeft.tasks._settings import TaskSettings

if TYPE_CHECKING:
    from coeft.tasks._task import Task

METRICS = ("accuracy", "balanced_accuracy", "f1", "loss", "macro_f1", "matthews", "top5")
SEVERAL = ("exact_match", "loss", "macro_f1", "mean_average_precision", "micro_f1")  # with multi_label


@dataclass(frozen=True, kw_only=True)
class Classification(TaskSettings):
    """Settings of a classification run."""

    kind: str = "classification"
    metric: str = "accuracy"
    """What picks the epoch and is reported: accuracy, balanced_accuracy, loss, macro_f1, matthews, f1 (of the second of
    two classes) or top5; with multi_label, exact_match, loss, macro_f1, mean_average_precision or micro_f1."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes in training, in [0, 1)."""
    class_weight: Any = None
    """Weights of the classes in the training loss: null, all alike; balanced, in inverse proportion to their samples in
    the fold's training part; or some by name, such as {rose: 2}, the others being 1. With multi_label, of the samples
    that have the class against those that have not."""
    multi_label: bool = False
    """A sample may have several classes, or none; each is predicted by itself."""

    def __post_init__(self) -> None:
        metrics = SEVERAL if self.multi_label else METRICS
        if self.metric not in metrics:
            where = "task.metric with task.multi_label=true" if self.multi_label else "task.metric"
            raise UserError(f"{where}: no metric {self.metric!r}; {near(self.metric, metrics)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        _check_weights(self.class_weight)
        if self.multi_label and self.label_smoothing:
            raise UserError("task.label_smoothing is for one class a sample; set it to 0 with task.multi_label=true")

    @property
    def target(self) -> str:
        """What the labels are: one class a sample, or several."""
        return "classes" if self.multi_label else "class"

    def outputs(self, class_names: Sequence[str]) -> int:
        """Width of the head.

        Raises:
            UserError: there are too few classes.
        """
        if len(class_names) < 2:
            what = "class" if len(class_names) == 1 else "classes"
            raise UserError(f"the data has {len(class_names)} {what}; classification needs two or more")
        return len(class_names)

    def build(self, num_outputs: int) -> "Task":
        """Loss and metrics over so many classes."""
        from coeft.tasks._classification import ClassificationTask, MultiLabelTask

        if self.multi_label:
            return MultiLabelTask(num_outputs, metric=self.metric, class_weight=self.class_weight)
        return ClassificationTask(
            num_outputs, metric=self.metric, label_smoothing=self.label_smoothing, class_weight=self.class_weight
        )


def _check_weights(weights: object) -> None:
    """Refuse what are no weights.

    Raises:
        UserError: says what would be.
    """
    if weights is None or weights == "balanced":
        return
    right = "null, balanced, or weights by class such as {rose: 2}"
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"task.class_weight must be {right}, not {weights!r}")
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 < weight < math.inf):
            raise UserError(f"task.class_weight: the weight of {name!r} must be a positive number, not {weight!r}")
