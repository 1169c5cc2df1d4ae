"""AdamW with a warm-up and a schedule; learning rates per method and for the head."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError
from coeft.optim._settings import OptimSettings

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimSettings):
    """Settings of torch.optim.AdamW."""

    kind: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the running means of the gradient and of its square, both in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}")

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        """The optimizer over parameter groups that carry their own lr and weight_decay."""
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]))
