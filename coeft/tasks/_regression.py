"""Loss, metrics and predictions of regression."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from coeft.tasks._task import Task

SHOWN = 2000  # points of the picture; of more, so many spread evenly


class RegressionTask(Task):
    """One number a sample: outputs (B, 1) in the units of the data, labels (B,) float."""

    num_outputs = 1

    def __init__(self, *, metric: str) -> None:
        self.metric = metric
        self.deviation = 1.0
        """Standard deviation of the training part's numbers, the unit of the loss."""

    def scale(self, labels: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of training labels; a deviation of 1 where all are equal."""
        values = labels.astype(np.float64)
        return float(values.mean()), float(values.std()) or 1.0

    def use_scale(self, scale: tuple[float, float]) -> None:
        self.deviation = scale[1]

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """Mean squared error in float32, in units of the training part's variance."""
        error = (logits.float().squeeze(-1) - batch["labels"].float()) / self.deviation
        return error.square().mean()

    def metrics(self) -> "Pairs":
        """All outputs and labels."""
        return Pairs()

    def update(self, metrics: Any, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        metrics.update(logits.float().squeeze(-1), batch["labels"].float())

    def scalars(self) -> list[str]:
        return ["mae", "mse", "pearson", "spearman"]

    def compute(self, metrics: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Errors in the units of the data; correlations are 0 where all outputs or all labels are equal."""
        outputs, labels = metrics.compute().double().cpu().numpy()
        error = outputs - labels
        scalars = {
            "mae": float(np.abs(error).mean()),
            "mse": float(np.square(error).mean()),
            "pearson": correlation(outputs, labels),
            "spearman": correlation(ranks(outputs), ranks(labels)),
        }
        chosen = np.unique(np.linspace(0, len(labels) - 1, min(SHOWN, len(labels))).round().astype(np.int64))
        points = [[round(float(labels[i]), 7), round(float(outputs[i]), 7)] for i in chosen]
        return scalars, {"points": points}

    def joined(self, extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The points of all folds."""
        return {"points": [point for extra in extras for point in extra["points"]]}

    def plot(self, extras: Mapping[str, Any], class_names: list[str], folder: Path) -> None:
        from coeft import plots  # matplotlib, which predictions do not need

        plots.scatter(extras["points"], folder / "predictions.png")

    def scores(self, logits: Tensor) -> Tensor:
        """The numbers in float64: (N, 1) to the same."""
        return logits.double()

    def table(self, scores: Tensor, class_names: list[str]) -> tuple[list[str], list[list[str]]]:
        return ["prediction"], [[f"{float(row):.6g}"] for row in scores.squeeze(-1)]


class Pairs(Metric):
    """All outputs and labels: float32 (2, N), in the order of batches, process by process."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.outputs.append(outputs)  # type: ignore[operator, union-attr]
        self.labels.append(labels)  # type: ignore[operator, union-attr]

    def compute(self) -> Tensor:
        return torch.stack([dim_zero_cat(self.outputs), dim_zero_cat(self.labels)])  # type: ignore[arg-type]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two series; 0 if one of them does not vary."""
    one, other = first - first.mean(), second - second.mean()
    size = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum() / size) if size > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
