"""Statistics of scores over folds and seeds.

The folds of a cross-validation share training data, so their scores are not independent and the usual t interval is
too narrow. Everything here therefore takes the ratio of held-out to training samples, with which Nadeau and Bengio
correct the variance ("Inference for the Generalization Error", Machine Learning 52, 2003); with ratio 0 it is the usual
one. For several cross-validations with different seeds it is the corrected repeated k-fold test of Bouckaert and Frank
("Evaluating the Replicability of Significance Tests for Comparing Learning Algorithms", PAKDD 2004).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores in short."""

    count: int
    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None of a single score."""
    low: float | None
    """Lower end of the confidence interval of the mean; None of a single score."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired test of scores against a baseline's."""

    count: int
    """Pairs."""
    difference: float
    """Mean of scores minus baseline."""
    low: float | None
    """Lower end of the confidence interval of the difference; None of a single pair."""
    high: float | None
    t: float | None
    """None of a single pair; infinite if all differences are equal and not zero."""
    p: float | None
    """Two-sided."""


def summarize(scores: Sequence[float], *, ratio: float = 0.0, confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and t interval.

    Args:
        scores: one for each fold and seed.
        ratio: held-out samples for each training sample, such as 1/4 in five folds; 0 for scores that share nothing.
        confidence: of the interval, in (0, 1).
    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("no scores to summarize")
    mean = statistics.fmean(scores)
    if len(scores) == 1:
        return Summary(count=1, mean=mean, sd=None, low=None, high=None)
    sd = statistics.stdev(scores)
    margin = _quantile(len(scores), confidence) * standard_error(sd, len(scores), ratio)
    return Summary(count=len(scores), mean=mean, sd=sd, low=mean - margin, high=mean + margin)


def compare(
    scores: Sequence[float], baseline: Sequence[float], *, ratio: float = 0.0, confidence: float = 0.95
) -> Comparison:
    """The corrected resampled t-test: whether the mean of paired differences is zero.

    t = mean(d) / sqrt((1/n + ratio) var(d)) with n - 1 degrees of freedom.

    Args:
        scores: one for each fold and seed.
        baseline: those of the same folds and seeds, in the same order.
        ratio: as of summarize; 0 is the ordinary paired t-test.
    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    differences = [score - other for score, other in zip(scores, baseline, strict=True)]
    short = summarize(differences, ratio=ratio, confidence=confidence)
    t, p = _test(short, ratio)
    return Comparison(count=short.count, difference=short.mean, low=short.low, high=short.high, t=t, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted by Holm's step-down method, in the order given.

    S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statist. 6, 1979. It keeps the chance
    of any false finding among all tests below the level, whatever the dependence between them.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def standard_error(sd: float, count: int, ratio: float) -> float:
    """Of the mean of `count` scores whose training data overlaps: sqrt(1/n + ratio) sd."""
    return math.sqrt(1 / count + ratio) * sd


def _quantile(count: int, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))


def _test(differences: Summary, ratio: float) -> tuple[float | None, float | None]:
    """t and p; rounding noise of equal differences counts as no spread."""
    if differences.sd is None:
        return None, None
    if differences.sd <= 1e-12 * max(1.0, abs(differences.mean)):
        return (0.0, 1.0) if abs(differences.mean) <= 1e-12 else (math.copysign(math.inf, differences.mean), 0.0)
    t = differences.mean / standard_error(differences.sd, differences.count, ratio)
    return t, float(2 * stats.t.sf(abs(t), differences.count - 1))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (cost, score) that no other one beats: as cheap and better, or as good and cheaper.

    In the order of rising cost; of equal points, all. Scores are better when larger.
    """
    front = [
        index
        for index, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    ]
    return sorted(front, key=lambda index: points[index])


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of about the same confidence."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean probability of the predicted class; 0 of an empty bin."""
    accuracy: float
    """Share that is right; 0 of an empty bin."""


def reliability(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 15) -> tuple[list[Bin], float]:
    """Equal-width bins of confidence, and the expected calibration error: the mean of |accuracy - confidence|, each
    bin weighed by its share of the predictions (Guo et al., arXiv:1706.04599).

    Args:
        confidences: probability of each predicted class, in [0, 1].
        right: whether that class is the true one.
    """
    counts, sums, hits = [0] * bins, [0.0] * bins, [0] * bins
    for confidence, hit in zip(confidences, right, strict=True):
        # (low, high], as in the paper: 1.0 falls into the last bin
        place = min(bins - 1, max(0, math.ceil(confidence * bins) - 1))
        counts[place] += 1
        sums[place] += confidence
        hits[place] += bool(hit)
    found = [
        Bin(
            low=place / bins,
            high=(place + 1) / bins,
            count=count,
            confidence=total / count if count else 0.0,
            accuracy=hit / count if count else 0.0,
        )
        for place, (count, total, hit) in enumerate(zip(counts, sums, hits, strict=True))
    ]
    everything = sum(counts) or 1
    return found, sum(each.count * abs(each.accuracy - each.confidence) for each in found) / everything
