"""What every task is: a loss, metrics, and what its predictions look like."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from coeft.errors import UserError
from coeft.tasks._direction import smaller_is_better

if TYPE_CHECKING:
    from coeft.backbones._backbone import Backbone
    from coeft.data._part import Part


class Task(ABC):
    """What a run optimises and reports. A batch is the data's: the model's inputs with their `labels`."""

    metric: str
    """What picks the epoch and is reported."""
    num_outputs: int
    """Width of the head; 0 where the model's own output layer is used."""

    @property
    def mode(self) -> str:
        """Whether the reported metric is better when it is larger ("max") or smaller ("min")."""
        return "min" if smaller_is_better(self.metric) else "max"

    def forward(
        self, backbone: "Backbone", inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, training: bool
    ) -> Tensor:
        """What the other methods take as logits: the backbone's own.

        Args:
            inputs: as the backbone takes them.
            batch: as the data gives it.
        """
        return backbone.forward(inputs)

    def check(self, backbone: "Backbone") -> None:  # noqa: B027
        """Try whether the backbone can do what the settings ask for.

        Raises:
            UserError: it cannot.
        """

    def capacity(self, backbone: "Backbone", data: Any) -> int | None:
        """Tokens of a row that several training texts share; None where every text has its own.

        Args:
            data: the settings of the data.
        """
        return None

    @abstractmethod
    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """The mean over the batch's units (see `weight`), in float32."""

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """How many units the mean of `loss` is over: samples.

        The loss of an optimizer step is the mean over the units of all its micro-batches and processes, however they
        fall on them.
        """
        return len(batch["labels"])

    def scale(self, labels: np.ndarray) -> tuple[float, float] | None:
        """Mean and standard deviation that the head's outputs are scaled by, from the training labels; None is none."""
        return None

    def use_scale(self, scale: tuple[float, float]) -> None:  # noqa: B027
        """What follows for the loss from the scale of the head's outputs; nothing by default."""

    def use_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> None:  # noqa: B027
        """What follows for the loss from the labels of the fold's training part; nothing by default."""

    @abstractmethod
    def metrics(self) -> Metric | MetricCollection:
        """Fresh state, which adds up over batches and processes."""

    def update(self, metrics: Any, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch to the state."""
        metrics.update(logits, batch["labels"])

    @abstractmethod
    def compute(self, metrics: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics by name, and what is more than a number, ready for JSON, as `detail` and `plot` take it."""

    @abstractmethod
    def scalars(self) -> list[str]:
        """Names of the metrics, the loss not among them."""

    def joined(self, extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What several folds have beyond numbers, as one."""
        return {}

    def detail(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of results.json that are lists."""
        return {}

    def plot(self, extras: Mapping[str, Any], class_names: list[str], folder: Path) -> None:  # noqa: B027
        """Pictures of what is beyond numbers, as PNG files of a folder; none by default."""

    def write_samples(  # noqa: B027
        self, backbone: "Backbone", part: "Part", file: Path, *, epoch: int, seed: int
    ) -> None:
        """Show what the model does with a few samples after an epoch, in a file; nothing by default."""

    def scores(self, logits: Tensor) -> Tensor:
        """What is averaged over fold models, float64 (N, num_outputs): probabilities, or numbers."""
        raise UserError(f"{type(self).__name__} has no scores to average")

    def table(self, scores: Tensor, class_names: list[str]) -> tuple[list[str], list[list[str]]]:
        """Columns of a table of predictions after `input`, and a row for each sample."""
        raise UserError(f"{type(self).__name__} has no table of predictions")
