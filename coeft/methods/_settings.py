"""Settings that every PEFT method has."""

from dataclasses import dataclass
from typing import Any

from coeft.errors import UserError
from coeft.optim._schedule import check_rates


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Where a method acts and how fast it learns."""

    kind: str = ""
    layers: list[Any] | None = None
    """Indices (negative from the end) or regular expressions on full names; null is all of them."""
    lr: float | None = None
    """Peak learning rate of this method's parameters; null takes optim.lr."""
    weight_decay: float | None = None
    """Weight decay of this method's parameters; null takes optim.weight_decay."""

    def __post_init__(self) -> None:
        check_rates(f"peft.{self.kind}", self.lr, self.weight_decay)
        for layer in self.layers or []:
            if isinstance(layer, bool) or not isinstance(layer, int | str):
                raise UserError(f"peft.{self.kind}.layers: {layer!r} is neither an index nor a regular expression")
        if self.layers is not None and not self.layers:
            raise UserError(f"peft.{self.kind}.layers is empty: the method would attach to nothing; null is all layers")
