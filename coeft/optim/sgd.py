"""SGD with momentum, a warm-up and a schedule; learning rates per method and for the head."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError
from coeft.optim._settings import OptimSettings

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class SGD(OptimSettings):
    """Settings of torch.optim.SGD."""

    kind: str = "sgd"
    lr: float = 1e-2
    momentum: float = 0.9
    """Decay of the running mean of the gradient, in [0, 1)."""
    nesterov: bool = False
    """Look ahead along the momentum before taking the gradient's step; needs momentum above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum must be in [0, 1), not {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov needs optim.momentum above 0")

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        """The optimizer over parameter groups that carry their own lr and weight_decay."""
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
