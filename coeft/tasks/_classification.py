"""Loss, metrics and predictions of single-label classification."""

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


class ClassificationTask:
    """What a classification run optimises and reports over `num_classes` classes."""

    def __init__(self, num_classes: int, *, metric: str, label_smoothing: float) -> None:
        if metric == "top5" and num_classes <= 5:
            raise UserError(f"task.metric=top5 needs more than 5 classes; the data has {num_classes}")
        self.num_classes = num_classes
        self.metric = metric
        self.label_smoothing = label_smoothing

    @property
    def mode(self) -> str:
        """Whether the reported metric is better when it is larger ("max") or smaller ("min")."""
        return "min" if self.metric == "loss" else "max"

    def loss(self, logits: Tensor, labels: Tensor, *, training: bool) -> Tensor:
        """Mean cross entropy in nats, in float32; label smoothing acts in training only.

        logits (B, num_classes), labels (B,) int64.
        """
        smoothing = self.label_smoothing if training else 0.0
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def metrics(self) -> MetricCollection:
        """Fresh metrics over logits (B, num_classes) and labels (B,): fractions in [0, 1], and counts."""
        count = self.num_classes
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


def split_confusion(computed: dict[str, Tensor]) -> tuple[dict[str, float], Tensor]:
    """The scalar metrics as floats, and the confusion matrix (true class, predicted class) of counts."""
    confusion = computed["confusion"].cpu()
    return {name: float(value) for name, value in computed.items() if name != "confusion"}, confusion


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Share of each true class that was predicted right; None for a class with no example."""
    totals = confusion.sum(1)
    hits = confusion.diagonal()
    return [float(hit / total) if total else None for hit, total in zip(hits.double(), totals.double(), strict=True)]


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes in float64: (N, num_classes) to (N, num_classes)."""
    return torch.softmax(logits.double(), dim=-1)
