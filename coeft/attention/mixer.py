"""The trained part of Coeff-Tuning: a matrix of coefficients that mixes the attention maps of one layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITS = ("residual", "identity", "random")


class CoeffMixer(nn.Module):
    """maps (B, H, N, M) -> mixed maps, where head g gets sum_h alpha'[g, h] * maps[:, h].

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
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.init = init
        self.site = site
        self.active = False  # set by forward, so that the layer can tell whether its maps were mixed
        alpha = torch.zeros(num_heads, num_heads, dtype=torch.float32, device=device)
        if init == "identity":
            alpha = torch.eye(num_heads, dtype=torch.float32, device=device)
        elif init == "random":
            alpha.normal_(std=num_heads**-0.5)
        self.coeff_alpha = nn.Parameter(alpha)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, dropout={self.dropout}, init={self.init}"

    def alpha(self) -> Tensor:
        """alpha = alpha' - I without dropout, (H, H): what adapters hold and pictures show, for every init."""
        return self.coeff_alpha if self.init == "residual" else self.coeff_alpha - self._identity()

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """Set the coefficients so that alpha() gives `alpha`, (H, H)."""
        if alpha.shape != self.coeff_alpha.shape:
            raise ValueError(f"{self.site}: alpha is {list(alpha.shape)}, not {list(self.coeff_alpha.shape)}")
        alpha = alpha.to(self.coeff_alpha)
        self.coeff_alpha.copy_(alpha if self.init == "residual" else alpha + self._identity())

    def forward(self, maps: Tensor) -> Tensor:
        if maps.dim() != 4 or maps.shape[1] != self.num_heads:
            raise ValueError(
                f"{self.site}: expected attention maps (batch, {self.num_heads} heads, queries, keys), "
                f"got {list(maps.shape)}"
            )
        self.active = True
        dropped = F.dropout(self.coeff_alpha, self.dropout, self.training)
        delta = dropped if self.init == "residual" else dropped - self._identity()
        flat = maps.flatten(2)  # (B, H, N * M)
        # In the type of the maps. Under autocast timm's softmax gives float32: mixing there as well leaves one
        # rounding, that of the mixed maps, while I + delta in half precision would lose every delta below 2^-8.
        with torch.autocast(maps.device.type, enabled=False):
            if maps.dtype not in (torch.bfloat16, torch.float16):
                return ((delta + self._identity()).to(maps.dtype) @ flat).view(maps.shape)
            # A model wholly in half precision: delta apart from I, added in the float32 accumulator, so that only the
            # result is rounded. The maps themselves then hide deltas below about 2^-8, in the forward.
            delta = delta.to(maps.dtype).expand(maps.shape[0], -1, -1)
            return torch.baddbmm(flat, delta, flat).view(maps.shape)

    # The hooks of the attention layer. Bound methods of this module, so that a deep copy of the model acts on its own
    # mixers. `active` is False outside of a layer's forward; torch.compile guards on it without recompiling.

    def on_start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the attention layer."""
        self.active = False

    def on_maps(self, module: nn.Module, args: Any, maps: Tensor) -> Tensor:
        """Forward hook of the module through which the layer's maps pass after softmax and dropout."""
        return self(maps)

    def on_end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the attention layer: it must have called on_maps.

        Raises:
            RuntimeError: it did not, so that the coefficients would silently have no effect.
        """
        if not self.active:
            raise RuntimeError(
                f"{self.site}: the attention maps did not pass through the coeff mixer, so that the coefficients would "
                f"have no effect; fused_attn must stay False and attn_drop in place after attaching coeff"
            )
        self.active = False

    def _identity(self) -> Tensor:
        return torch.eye(self.num_heads, dtype=self.coeff_alpha.dtype, device=self.coeff_alpha.device)
