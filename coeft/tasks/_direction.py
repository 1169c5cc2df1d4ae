"""Which way a metric is better. Imports no torch: reports read it too."""

MINIMISED = ("calibration_error", "loss", "mae", "mse", "perplexity")


def smaller_is_better(metric: str) -> bool:
    """Whether the metric is an error or a loss."""
    return metric in MINIMISED
