"""How often an epoch draws each sample where the classes are made more even, and the draw itself."""

import numpy as np


def expected_draws(labels: np.ndarray, num_classes: int, balance: float) -> np.ndarray:
    """How often each sample is drawn in an epoch of as many draws as there are samples: float64 (N,), with sum N.

    A class of share f gets draws in proportion to f^(1 - balance): with 0 every sample is drawn once, with 1 every
    class is drawn equally often. A sample with several classes counts as its rarest one (repeat factors of Gupta et al.
    2019, arXiv:1908.03195); those without a class are a class of their own.

    Args:
        labels: int64 (N,) classes, or float32 (N, num_classes) of 0 and 1.
        balance: in [0, 1].
    """
    if labels.ndim == 1:
        members = np.zeros((len(labels), num_classes), bool)
        members[np.arange(len(labels)), labels] = True
    else:
        members = labels > 0
        members = np.concatenate([members, ~members.any(1, keepdims=True)], 1)
    counts = members.sum(0)
    factors = np.where(counts > 0, len(labels) / np.maximum(counts, 1), 0.0) ** balance
    draws = (members * factors).max(1)
    result: np.ndarray = draws * (len(labels) / draws.sum())
    return result


def drawn(expected: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of an epoch in a random order, int64 (N,), by systematic sampling.

    A sample that is expected e times comes floor(e) or ceil(e) times, and so does a class: fewer repeats and fewer gaps
    than independent draws have.

    Args:
        expected: (N,), with sum N.
        classes: (N,); samples of one class are drawn next to each other.
    """
    order = np.lexsort((rng.random(len(expected)), classes))
    edges = np.cumsum(expected[order])
    points = rng.random() + np.arange(len(expected))
    places = np.searchsorted(edges, points, side="right")
    return rng.permutation(order[np.minimum(places, len(order) - 1)])


def strata_of(labels: np.ndarray) -> np.ndarray:
    """A class for each sample to draw by, (N,); equal combinations of several classes are one."""
    if labels.ndim == 1:
        return labels
    _, combination = np.unique(labels > 0, axis=0, return_inverse=True)
    flat: np.ndarray = combination.reshape(-1)
    return flat
