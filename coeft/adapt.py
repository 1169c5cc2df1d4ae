"""The stack: PEFT methods on one frozen model, in order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """One place a method attached to, as dry_run shows it."""

    name: str
    """Full module or parameter name."""
    route: str
    """How it acts there, such as "maps (attn_drop)", "rank 8" or "rank 8 on q, v"."""
    num_parameters: int


@dataclass(kw_only=True)
class Attachment:
    """What one method did to a model."""

    method: str
    places: list[Place]
    parameters: dict[str, nn.Parameter]
    """Name in model.named_parameters() -> parameter that this method trains."""
    probes: dict[str, nn.Module] = field(default_factory=dict)
    """Place -> module that every forward of the model must call; else the method is silently inactive."""
    pack: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    """The portable form: (adapter_config.json, tensors of adapter_model.safetensors), keys as in stock peft."""
    unpack: Callable[[dict[str, Any], dict[str, Tensor]], None]
    """Fill the parameters from that form. Raises UserError naming what is missing, unexpected or of another shape."""
