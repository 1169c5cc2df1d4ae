"""Settings that every optimizer has."""

from dataclasses import dataclass, field

from coeft.errors import UserError
from coeft.optim._schedule import SCHEDULES, Head, check_rates


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Rates and their schedule."""

    kind: str = ""
    lr: float = 3e-3
    """Peak learning rate of every PEFT parameter whose method sets none of its own."""
    weight_decay: float = 0.0
    """Weight decay of the same parameters. One-dimensional ones (biases, norms) get none."""
    schedule: str = "cosine"
    """cosine or linear (both fall to zero at the last step), or constant."""
    warmup_fraction: float = 0.1
    """Fraction of all optimizer steps in which the rate rises linearly from zero."""
    head: Head = field(default_factory=Head)
    """Rates of the task head."""

    def __post_init__(self) -> None:
        check_rates("optim", self.lr, self.weight_decay)
        check_rates("optim.head", self.head.lr, self.head.weight_decay)
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"optim.warmup_fraction must be in [0, 1), not {self.warmup_fraction}")
