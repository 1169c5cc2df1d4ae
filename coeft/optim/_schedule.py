"""Learning-rate schedules as factors of the peak rate, and the settings that optimizers share."""

import math
from dataclasses import dataclass

from coeft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Head:
    """Rates of the task head."""

    lr: float | None = 1e-2
    """Peak learning rate: a fresh head learns from nothing, so it wants a larger one. Null takes optim.lr."""
    weight_decay: float | None = None
    """Null takes optim.weight_decay."""


def check_rates(where: str, lr: float | None, weight_decay: float | None) -> None:
    """Refuse a learning rate that is not positive or a negative weight decay; None is allowed."""
    if lr is not None and not (lr > 0 and math.isfinite(lr)):
        raise UserError(f"{where}.lr must be a positive number, not {lr}")
    if weight_decay is not None and not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise UserError(f"{where}.weight_decay must be 0 or more, not {weight_decay}")


SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def factor(schedule: str, warmup_fraction: float, step: int, total_steps: int) -> float:
    """The factor of the peak learning rate at a step, counted from 0, of total_steps optimizer steps."""
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return SCHEDULES[schedule](min(1.0, progress))
