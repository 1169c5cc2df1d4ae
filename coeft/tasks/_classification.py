"""Loss, metrics and predictions of classification: one class a sample, or several."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from coeft.errors import UserError, near
from coeft.tasks._task import Task


class ClassificationTask(Task):
    """One of `num_outputs` classes a sample: logits (B, num_outputs), labels (B,) int64."""

    def __init__(
        self, num_outputs: int, *, metric: str, label_smoothing: float = 0.0, class_weight: Any = None
    ) -> None:
        if metric == "top5" and num_outputs <= 5:
            raise UserError(f"task.metric=top5 needs more than 5 classes; the data has {num_outputs}")
        if metric == "f1" and num_outputs != 2:
            raise UserError(f"task.metric=f1 is that of the second of 2 classes; the data has {num_outputs}: macro_f1?")
        self.num_outputs = num_outputs
        self.metric = metric
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.weights: Tensor | None = None

    def use_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> None:
        """Weights (num_outputs,): those that are balanced have mean 1 over the training samples.

        Raises:
            UserError: a weight is of a class that there is not.
        """
        if self.class_weight == "balanced":
            counts = np.bincount(labels, minlength=self.num_outputs)
            self.weights = balanced_weights(counts)
        elif self.class_weight is not None:
            self.weights = named_weights(self.class_weight, class_names)

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """Mean cross entropy in nats, in float32; label smoothing and weights of classes act in training only.

        Weighted losses are divided by the number of samples, not by the sum of the weights: the mean over batches is
        then the loss over all samples, however they fall on batches, micro-batches and processes.
        """
        if not training:
            return F.cross_entropy(logits.float(), batch["labels"])
        smoothing = self.label_smoothing
        if self.weights is None:
            return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)
        each = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing, reduction="none")
        return (each * self.weights.to(each.device)[batch["labels"]]).mean()

    def metrics(self) -> MetricCollection:
        """Over logits and labels: fractions in [0, 1], and counts."""
        count = self.num_outputs
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "macro_f1": MulticlassF1Score(count, average="macro"),
            "balanced_accuracy": MulticlassAccuracy(count, average="macro"),
            "calibration_error": MulticlassCalibrationError(count, n_bins=15),
            "matthews": MulticlassMatthewsCorrCoef(count),
            "confusion": MulticlassConfusionMatrix(count),
        }
        if count == 2:
            metrics["f1"] = SecondClassF1()
        if count > 5:
            metrics["top5"] = MulticlassAccuracy(count, average="micro", top_k=5)
        # Which of them share a state. Torchmetrics would find out by comparing the states after the first batch, where
        # top5 and accuracy are equal if all is right, and would take them for the same from there on.
        groups = [["balanced_accuracy", "macro_f1", "f1"], ["confusion", "matthews"]]
        shared = [[name for name in group if name in metrics] for group in groups]
        apart = [[name] for name in metrics if not any(name in group for group in groups)]
        return MetricCollection(metrics, compute_groups=shared + apart)

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


class SecondClassF1(MulticlassF1Score):
    """F1 of the second of two classes, the "positive" one of most benchmarks with two."""

    def __init__(self) -> None:
        super().__init__(2, average="none")

    def compute(self) -> Tensor:
        return super().compute()[1]


class MultiLabelTask(Task):
    """Any of `num_outputs` classes a sample: logits (B, num_outputs), labels (B, num_outputs) float of 0 and 1."""

    def __init__(self, num_outputs: int, *, metric: str, class_weight: Any = None) -> None:
        self.num_outputs = num_outputs
        self.metric = metric
        self.class_weight = class_weight
        self.weights: Tensor | None = None

    def use_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> None:
        """Weights (num_outputs,) of the samples that have a class; balanced, they weigh as much as those without.

        Raises:
            UserError: a weight is of a class that there is not.
        """
        if self.class_weight == "balanced":
            with_it = labels.sum(0, dtype=np.float64)
            ratio = (len(labels) - with_it) / np.maximum(with_it, 1)
            # a class that no sample has, or every one, has nothing to be weighed against
            self.weights = torch.from_numpy(np.where((with_it > 0) & (ratio > 0), ratio, 1.0)).float()
        elif self.class_weight is not None:
            self.weights = named_weights(self.class_weight, class_names)

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """Mean binary cross entropy over samples and classes in nats, in float32; weights act in training only."""
        weights = None if self.weights is None or not training else self.weights.to(logits.device)
        return F.binary_cross_entropy_with_logits(logits.float(), batch["labels"].float(), pos_weight=weights)

    def metrics(self) -> MetricCollection:
        """Over logits and labels, a class counting as predicted above a probability of one half: fractions in [0, 1].

        mean_average_precision is the mean over the classes that occur.
        """
        count = self.num_outputs
        return MetricCollection(
            {
                "micro_f1": MultilabelF1Score(count, average="micro"),
                "macro_f1": MultilabelF1Score(count, average="macro"),
                "exact_match": MultilabelExactMatch(count),
                "mean_average_precision": MultilabelAveragePrecision(count, average="none"),
                "totals": LabelTotals(count),
            },
            compute_groups=False,
        )

    def update(self, metrics: Any, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        # one label alone has no second dimension in torchmetrics' eyes, so shapes are made plain
        metrics.update(torch.sigmoid(logits.float()), batch["labels"].long())

    def scalars(self) -> list[str]:
        return ["exact_match", "macro_f1", "mean_average_precision", "micro_f1"]

    def compute(self, metrics: Any) -> tuple[dict[str, float], dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive samples")  # such classes are left out below
            computed = metrics.compute()
        totals = computed.pop("totals").cpu()
        precisions = computed.pop("mean_average_precision").cpu().double()
        there = totals[0] > 0
        scalars = {name: float(value) for name, value in computed.items()}
        scalars["mean_average_precision"] = float(precisions[there].mean()) if bool(there.any()) else 0.0
        return scalars, {"label_totals": totals.tolist()}

    def joined(self, extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The sums of the counts."""
        return {"label_totals": torch.tensor([extra["label_totals"] for extra in extras]).sum(0).tolist()}

    def detail(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        return {"per_class_f1": per_class_f1(torch.tensor(extras["label_totals"]))}

    def plot(self, extras: Mapping[str, Any], class_names: list[str], folder: Path) -> None:
        from coeft import plots  # matplotlib, which predictions do not need

        scores = per_class_f1(torch.tensor(extras["label_totals"]))
        plots.bars(
            [0.0 if score is None else score for score in scores], class_names, "F1", folder / "per_class_f1.png"
        )

    def scores(self, logits: Tensor) -> Tensor:
        """The probability of each class in float64."""
        return torch.sigmoid(logits.double())

    def table(self, scores: Tensor, class_names: list[str]) -> tuple[list[str], list[list[str]]]:
        """The classes above one half, separated by ";", and the probability of each."""
        rows = []
        for row in scores:
            chosen = [name for name, share in zip(class_names, row.tolist(), strict=True) if share > 0.5]
            rows.append([";".join(chosen), *(f"{float(share):.6g}" for share in row)])
        return ["prediction", *class_names], rows


class LabelTotals(Metric):
    """Samples of each class that are true, predicted, and both: int64 (3, num_classes)."""

    full_state_update = False
    totals: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, shares: Tensor, labels: Tensor) -> None:
        """Shares (B, num_classes) in [0, 1] and labels of 0 and 1."""
        predicted, true = shares > 0.5, labels > 0
        self.totals += torch.stack([true.sum(0), predicted.sum(0), (predicted & true).sum(0)])

    def compute(self) -> Tensor:
        return self.totals


def balanced_weights(counts: np.ndarray) -> Tensor:
    """A weight for each class, float32 (C,), such that classes weigh alike and the samples weigh 1 on average.

    N / (C n_c), over the C classes that occur; 1 for those that do not.

    counts (C,): samples of each class.
    """
    there = counts > 0
    weights = np.ones(len(counts))
    weights[there] = counts.sum() / (there.sum() * counts[there])
    return torch.from_numpy(weights).float()


def named_weights(weights: Mapping[str, float], class_names: Sequence[str]) -> Tensor:
    """A weight for each class, float32 (C,), 1 where none is given.

    Raises:
        UserError: a name is no class.
    """
    given = {str(name): float(weight) for name, weight in weights.items()}
    for name in given:
        if name not in class_names:
            raise UserError(f"task.class_weight: the data has no class {name!r}; {near(name, class_names)}")
    return torch.tensor([given.get(name, 1.0) for name in class_names])


def per_class_f1(totals: Tensor) -> list[float | None]:
    """F1 of each class from LabelTotals; None for a class that is neither true nor predicted anywhere."""
    true, predicted, both = totals.double()
    sums = true + predicted
    return [float(2 * hit / total) if total else None for hit, total in zip(both, sums, strict=True)]


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Share of each true class that was predicted right; None for a class with no example.

    confusion (num_classes, num_classes): counts by true class, predicted class.
    """
    totals = confusion.sum(1)
    hits = confusion.diagonal()
    return [float(hit / total) if total else None for hit, total in zip(hits.double(), totals.double(), strict=True)]
