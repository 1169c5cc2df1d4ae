"""Statistics of the report against scipy, hand-computed and published values."""

import math

import numpy as np
import pytest
from scipy import stats

from coeft.report.statistics import compare, holm, pareto, reliability, summarize

SCORES = [0.91, 0.93, 0.90, 0.95, 0.92]
OTHERS = [0.88, 0.92, 0.89, 0.90, 0.91]


def test_without_a_ratio_the_interval_is_that_of_scipy() -> None:
    found = summarize(SCORES)
    low, high = stats.t.interval(0.95, 4, np.mean(SCORES), stats.sem(SCORES))
    assert found.mean == pytest.approx(np.mean(SCORES)) and found.sd == pytest.approx(np.std(SCORES, ddof=1))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_without_a_ratio_the_test_is_the_paired_t_test_of_scipy() -> None:
    found = compare(SCORES, OTHERS)
    expected = stats.ttest_rel(SCORES, OTHERS)
    interval = expected.confidence_interval(0.95)
    assert (found.t, found.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_the_correction_by_hand() -> None:
    # differences 3, 1, 1, 5, 1 percent: mean 2.2, variance 3.2; five folds, ratio 1/4
    # t = 2.2 / sqrt((1/5 + 1/4) 3.2) = 2.2 / 1.2 = 1.8333; two-sided p with 4 degrees of freedom
    found = compare(SCORES, OTHERS, ratio=1 / 4)
    assert found.difference == pytest.approx(0.022)
    assert found.t == pytest.approx(2.2 / 1.2)
    # the distribution function of t with 4 degrees of freedom is 1/2 + 3/4 (x - x^3/3), x = t / sqrt(4 + t^2)
    x = found.t / math.sqrt(4 + found.t**2)
    assert found.p == pytest.approx(2 * (0.5 - 0.75 * (x - x**3 / 3)))
    # and the interval: 2.776445 is the 97.5 % quantile in every table of t with 4 degrees of freedom
    assert found.high - found.difference == pytest.approx(2.776445 * 0.012, rel=1e-6)


def test_the_correction_is_the_more_careful_test() -> None:
    plain, corrected = compare(SCORES, OTHERS), compare(SCORES, OTHERS, ratio=0.25)
    assert corrected.p > plain.p and abs(corrected.t) < abs(plain.t)


def test_the_correction_keeps_the_level_on_overlapping_training_sets() -> None:
    """Two learners that are equally good, by ten folds over data drawn anew: the plain test finds too much.

    Each learner is the mean of its own noisy copy of the training targets, the score its squared error.
    """
    rng = np.random.default_rng(0)
    plain = corrected = 0
    for _ in range(400):
        truth = rng.normal(size=(2, 60))
        target = rng.normal(size=60)
        parts = np.array_split(rng.permutation(60), 10)
        scores = np.zeros((2, 10))
        for fold, held in enumerate(parts):
            rest = np.setdiff1d(np.arange(60), held)
            for learner in range(2):
                slope = (truth[learner, rest] * target[rest]).sum() / (truth[learner, rest] ** 2).sum()
                scores[learner, fold] = -((target[held] - slope * truth[learner, held]) ** 2).mean()
        plain += compare(scores[0], scores[1]).p < 0.05
        corrected += compare(scores[0], scores[1], ratio=1 / 9).p < 0.05
    assert corrected < plain
    assert corrected / 400 < 0.06


def test_a_single_score_has_no_spread_and_no_test() -> None:
    found = summarize([0.5])
    assert (found.sd, found.low, found.high) == (None, None, None)
    assert compare([0.5], [0.4]).p is None
    with pytest.raises(ValueError, match="no scores"):
        summarize([])


def test_equal_differences_have_no_spread() -> None:
    same = compare(SCORES, SCORES, ratio=0.25)
    assert (same.difference, same.t, same.p) == (0, 0, 1)
    shifted = compare([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    assert shifted.t == math.inf and shifted.p == 0


def test_pairs_must_be_as_many() -> None:
    with pytest.raises(ValueError):
        compare(SCORES, OTHERS[:-1])


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # by hand: 3 * 0.01, then 2 * 0.03, then not below that
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # R: p.adjust(1:5 / 100, "holm")
        ([0.9, 0.5], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], expected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(expected)


def test_the_pareto_front_by_hand() -> None:
    points = [(10, 0.9), (1, 0.5), (5, 0.9), (5, 0.7), (0, 0.4), (20, 0.95), (1, 0.5)]
    assert pareto(points) == [4, 1, 6, 2, 5]


def test_the_calibration_error_by_hand() -> None:
    # bins of a half: {0.2, 0.4 : one of two right} and {0.8, 1.0 : both right}
    bins, error = reliability([0.2, 0.4, 0.8, 1.0], [True, False, True, True], bins=2)
    assert [(each.count, each.accuracy) for each in bins] == [(2, 0.5), (2, 1.0)]
    assert error == pytest.approx((2 * abs(0.5 - 0.3) + 2 * abs(1.0 - 0.9)) / 4)


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 4)) * 2)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, 500))
    shares = logits.softmax(-1)
    confidence, predicted = shares.max(-1)
    _, error = reliability(confidence.tolist(), (predicted == labels).tolist())
    assert error == pytest.approx(float(multiclass_calibration_error(shares, labels, 4, n_bins=15)), rel=1e-5)
