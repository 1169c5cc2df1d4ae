"""An attention layer of a model, as methods that act on attention maps see it."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn

BOTH_ROUTES = "fused if large, else maps"


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer: where it is, its heads, and how a mixer reaches its maps."""

    name: str
    """Full module name, such as blocks.0.attn."""
    module: nn.Module
    num_heads: int
    """Query heads."""
    route: str
    """How the maps are reached, as dry_run shows it, such as "maps (attn_drop)"."""
    install: Callable[[nn.Module], None]
    """install(mixer): make mixer(maps) act on the post-softmax maps (B, H, N, M) in every forward of the layer."""


def drop_hooks(hooks: MutableMapping[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    """Take a hook out of the hooks of a module, such as module._forward_hooks."""
    for key in [key for key, registered in hooks.items() if registered == hook]:
        del hooks[key]
