"""AdamW with a warm-up and a schedule; learning rates per method and for the head."""

from dataclasses import dataclass, field

from coeft.optim._schedule import SCHEDULES, Head, check_rates
from coeft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Settings of torch.optim.AdamW. One-dimensional parameters (biases, norms) get no weight decay."""

    kind: str = "adamw"
    lr: float = 1e-3
    """Peak learning rate of every PEFT parameter whose method sets none of its own."""
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: str = "cosine"
    """cosine or linear (both fall to zero at the last step), or constant."""
    warmup_fraction: float = 0.1
    """Fraction of all optimizer steps in which the rate rises linearly from zero."""
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        check_rates("optim", self.lr, self.weight_decay)
        check_rates("optim.head", self.head.lr, self.head.weight_decay)
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"optim.warmup_fraction must be in [0, 1), not {self.warmup_fraction}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}")

    def build(self, groups: list[dict]):  # noqa: ANN201 (torch is imported late)
        """The optimizer over parameter groups that carry their own lr and weight_decay."""
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]))
