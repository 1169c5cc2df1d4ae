"""The stack: PEFT methods on one frozen model, in order."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from coeft.errors import UserError, near


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


def select_layers(names: Sequence[str], layers: Sequence[int | str] | None, where: str) -> list[int]:
    """Indices of the chosen names, ascending and each once; None chooses all.

    An int is an index (negative from the end). A string is a regular expression that is searched for in every name,
    so "4" finds blocks.4 and blocks.14 but "blocks\\.4$" only the first. `where` names the option in messages.

    Raises:
        UserError: an index is out of range, or a pattern is no regular expression or matches no name.
    """
    if layers is None:
        return list(range(len(names)))
    chosen: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            pattern = matcher(layer, where)
            found = [i for i, name in enumerate(names) if pattern.search(name)]
            if not found:
                raise UserError(f"{where}: {layer!r} matches no layer; {near(layer, names)}")
            chosen.update(found)
        elif isinstance(layer, int) and not isinstance(layer, bool):
            if not -len(names) <= layer < len(names):
                raise UserError(f"{where}: there is no layer {layer}; {_index_range(names)}")
            chosen.add(layer % len(names))
        else:
            raise UserError(f"{where}: {layer!r} is neither an index nor a regular expression")
    return sorted(chosen)


def matcher(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled regular expression; UserError naming the option and what is wrong with it otherwise."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def _index_range(names: Sequence[str]) -> str:
    if not names:
        return "this model has none to choose from"
    last = len(names) - 1
    return f"indices are 0 to {last}, or -{len(names)} to -1 from the end ({names[0]} ... {names[last]})"
