"""Loss, metrics and predictions of single-label classification."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from coeft.errors import UserError
from coeft.tasks._task import Task


class ClassificationTask(Task):
    """One of `num_outputs` classes a sample: logits (B, num_outputs), labels (B,) int64."""

    def __init__(self, num_outputs: int, *, metric: str, label_smoothing: float) -> None:
        if metric == "top5" and num_outputs <= 5:
            raise UserError(f"task.metric=top5 needs more than 5 classes; the data has {num_outputs}")
        self.num_outputs = num_outputs
        self.metric = metric
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """Mean cross entropy in nats, in float32; label smoothing acts in training only."""
        smoothing = self.label_smoothing if training else 0.0
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)

    def metrics(self) -> MetricCollection:
        """Over logits and labels: fractions in [0, 1], and counts."""
        count = self.num_outputs
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "macro_f1": MulticlassF1Score(count, average="macro"),
            "balanced_accuracy": MulticlassAccuracy(count, average="macro"),
            "calibration_error": MulticlassCalibrationError(count, n_bins=15),
            "confusion": MulticlassConfusionMatrix(count),
        }
        if count > 5:
            metrics["top5"] = MulticlassAccuracy(count, average="micro", top_k=5)
        return MetricCollection(metrics)

    def scalars(self) -> list[str]:
        return sorted(str(name) for name in self.metrics() if name != "confusion")

    def compute(self, metrics: Any) -> tuple[dict[str, float], dict[str, Any]]:
        computed = metrics.compute()
        confusion = computed.pop("confusion").cpu()
        return {name: float(value) for name, value in computed.items()}, {"confusion": confusion.tolist()}

    def joined(self, extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The sum of the confusion matrices."""
        return {"confusion": torch.tensor([extra["confusion"] for extra in extras]).sum(0).tolist()}

    def detail(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        return {"per_class_accuracy": per_class_accuracy(torch.tensor(extras["confusion"]))}

    def plot(self, extras: Mapping[str, Any], class_names: list[str], folder: Path) -> None:
        from coeft import plots  # matplotlib, which predictions do not need

        plots.confusion(torch.tensor(extras["confusion"]), class_names, folder / "confusion.png")

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax over classes in float64: (N, num_outputs) to the same."""
        return torch.softmax(logits.double(), dim=-1)

    def table(self, scores: Tensor, class_names: list[str]) -> tuple[list[str], list[list[str]]]:
        """The likeliest class, and the probability of each."""
        rows = [[class_names[int(row.argmax())], *(f"{float(share):.6g}" for share in row)] for row in scores]
        return ["prediction", *class_names], rows


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Share of each true class that was predicted right; None for a class with no example.

    confusion (num_classes, num_classes): counts by true class, predicted class.
    """
    totals = confusion.sum(1)
    hits = confusion.diagonal()
    return [float(hit / total) if total else None for hit, total in zip(hits.double(), totals.double(), strict=True)]
