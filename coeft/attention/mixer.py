"""The trained part of Coeff-Tuning: a matrix of coefficients that mixes the attention maps of one layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coeft.attention.functional import coeff_attention, prefers_blocks

INITS = ("residual", "identity", "random")
ROUTES = ("auto", "maps", "fused")


def start(num_heads: int, init: str, device: torch.device | str | None = None) -> Tensor:
    """The trained matrix (H, H) of a layer before training, by its init; see CoeffMixer."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    if init == "identity":
        return torch.eye(num_heads, dtype=torch.float32, device=device)
    coeff = torch.zeros(num_heads, num_heads, dtype=torch.float32, device=device)
    return coeff.normal_(std=num_heads**-0.5) if init == "random" else coeff


def to_alpha(coeff: Tensor, init: str) -> Tensor:
    """alpha = alpha' - I of a trained matrix (H, H): what adapters hold, for every init."""
    return coeff if init == "residual" else coeff - eye_like(coeff)


def from_alpha(alpha: Tensor, init: str) -> Tensor:
    """The trained matrix (H, H) of which to_alpha gives `alpha`."""
    return alpha if init == "residual" else alpha + eye_like(alpha)


def to_delta(coeff: Tensor, init: str, dropout: float, training: bool) -> Tensor:
    """alpha' - I of one forward, (H, H), from the trained matrix: dropout falls on what is trained."""
    return to_alpha(F.dropout(coeff, dropout, training), init)


def eye_like(matrix: Tensor) -> Tensor:
    """I in the size, type and device of a matrix (H, H)."""
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


class CoeffMixer(nn.Module):
    """maps (B, H, N, M) -> mixed maps, where head g gets sum_h alpha'[g, h] * maps[:, h].

    Or the whole attention of the layer: query, key, value -> what the mixed maps give, without holding the maps.

    By `init`, with dropout on the entries, scaled by 1 / (1 - p), one draw a forward, in training only:

        residual    alpha' = I + dropout(coeff_alpha)    coeff_alpha starts at zero; the identity is never dropped
        identity    alpha' = dropout(coeff_alpha)        coeff_alpha starts at I: dropout and weight decay act on it too
        random      alpha' = dropout(coeff_alpha)        coeff_alpha ~ N(0, 1/H)

    The last two are the ablations of the paper (arXiv:2503.18337). It does not say from which distribution it draws;
    variance 1/H keeps the mean square of the layer's output where heads are uncorrelated (ours).

    Outside of this class a layer is always described by alpha = alpha' - I: see `alpha` and `set_alpha`.

    Args:
        num_heads: H, query heads of the layer.
        dropout: probability p of dropping an entry, in [0, 1).
        init: one of INITS.
        site: name of the attention layer, for messages.
        route: for layers that have both ways: "maps", "fused" (the whole attention), or "auto", by the tokens of
            each forward. Results are equal to round-off.
        device: of the coefficients; their type is float32 whatever the model's is, since steps of 1e-3 vanish
            beside larger entries in half precision.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        dropout: float = 0.0,
        init: str = "residual",
        site: str = "attention",
        route: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if route not in ROUTES:
            raise ValueError(f"route must be one of {', '.join(ROUTES)}, not {route!r}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.init = init
        self.site = site
        self.route = route
        self.active = False  # set by forward, so that the layer can tell whether its maps were mixed
        self.had_fused_attn = False  # whether a layer of timm ran fused before the mixer came
        self.aside = False  # whether that layer runs as it did before, because the mixer does not mix
        self.plain = False  # whether a layer of transformers computes plain attention
        self.coeff_alpha = self._trained(init, device)

    def _trained(self, init: str, device: torch.device | str | None) -> Any:
        return nn.Parameter(start(self.num_heads, init, device))

    @property
    def mixes(self) -> bool:
        """Whether the layer's maps are mixed; False lets the layer run exactly as it did before the mixer came."""
        return True

    def extra_repr(self) -> str:
        return f"{self.num_heads}, dropout={self.dropout}, init={self.init}"

    def alpha(self) -> Tensor:
        """alpha = alpha' - I without dropout, (H, H): what adapters hold and pictures show, for every init."""
        return to_alpha(self.coeff_alpha, self.init)

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """Set the coefficients so that alpha() gives `alpha`, (H, H)."""
        if alpha.shape != self.coeff_alpha.shape:
            raise ValueError(f"{self.site}: alpha is {list(alpha.shape)}, not {list(self.coeff_alpha.shape)}")
        self.coeff_alpha.copy_(from_alpha(alpha.to(self.coeff_alpha), self.init))

    def forward(self, maps: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Tensor:
        """forward(maps) mixes maps; forward(query, key, value, **options of coeff_attention) is the whole attention."""
        if key is not None and value is not None:
            return self._attend(maps, key, value, options)
        if maps.dim() != 4 or maps.shape[1] != self.num_heads:
            raise ValueError(
                f"{self.site}: expected attention maps (batch, {self.num_heads} heads, queries, keys), "
                f"got {list(maps.shape)}"
            )
        self.active = True
        delta = self._delta()
        flat = maps.flatten(2)  # (B, H, N * M)
        # In the type of the maps. Under autocast timm's softmax gives float32: mixing there as well leaves one
        # rounding, that of the mixed maps, while I + delta in half precision would lose every delta below 2^-8.
        with torch.autocast(maps.device.type, enabled=False):
            if maps.dtype not in (torch.bfloat16, torch.float16):
                return ((delta + eye_like(delta)).to(maps.dtype) @ flat).view(maps.shape)
            # A model wholly in half precision: delta apart from I, added in the float32 accumulator, so that only the
            # result is rounded. The maps themselves then hide deltas below about 2^-8, in the forward.
            delta = delta.to(maps.dtype).expand(maps.shape[0], -1, -1)
            return torch.baddbmm(flat, delta, flat).view(maps.shape)

    def takes_all(self, items: int, queries: int, keys: int) -> bool:
        """Whether a layer that has both ways hands its whole attention over, for so many items and tokens."""
        if not self.mixes:
            return False
        if self.route == "auto":
            return prefers_blocks(items, self.num_heads, queries, keys)
        return self.route == "fused"

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        if query.dim() != 4 or query.shape[1] != self.num_heads:
            raise ValueError(
                f"{self.site}: expected queries (batch, {self.num_heads} heads, tokens, head size), "
                f"got {list(query.shape)}"
            )
        self.active = True
        delta = self._delta()
        return coeff_attention(query, key, value, delta + eye_like(delta), **options)

    def _delta(self) -> Tensor:
        """alpha' - I of one forward."""
        return to_delta(self.coeff_alpha, self.init, self.dropout, self.training)

    # The hooks of the attention layer. Bound methods of this module, so that a deep copy of the model acts on its own
    # mixers. `active` is False outside of a layer's forward; torch.compile guards on it without recompiling.

    def on_start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the attention layer."""
        self.active = False
        if self.had_fused_attn and self.mixes == self.aside:
            self.aside = not self.mixes
            vars(module)["fused_attn"] = self.aside

    def on_maps(self, module: nn.Module, args: Any, maps: Tensor) -> Tensor:
        """Forward hook of the module through which the layer's maps pass after softmax and dropout."""
        return self(maps) if self.mixes else maps

    def on_end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the attention layer: it must have called on_maps.

        Raises:
            RuntimeError: it did not, so that the coefficients would silently have no effect.
        """
        if self.mixes and not self.active:
            raise RuntimeError(
                f"{self.site}: the attention maps did not pass through the coeff mixer, so that the coefficients would "
                f"have no effect; fused_attn must stay False and attn_drop in place after attaching coeff"
            )
        self.active = False
