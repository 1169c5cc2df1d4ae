"""Exact head expansion: attention with mixed maps, written as plain attention with more heads.

With coefficients M = I + alpha, maps A_h, output projections O_g and v(g) the value that head g uses, a layer gives

    sum_g O_g (sum_h M_gh A_h) v(g)  =  sum over maps h and values v of  [sum over g with v(g) = v of M_gh O_g] A_h v

Each pair (h, v) is a head of plain attention: query and key of h, value v, and an output projection that holds the
coefficients. Scores stay what they were, so that scaling, softcap, sinks, norms of queries and keys, rotary positions,
masks and position biases act as before. What acts on the outputs of all heads together (a norm before the output
projection) forbids it.

With H query heads over K key-value heads (G = H / K queries share one), the pairs of one key head and one value head
share both, so that K^2 key-value heads with G queries each are enough: H K heads. Without grouped queries it is H^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ADDED = -1


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one layer after expansion: P key-value heads with G query heads each."""

    before: int
    """K, key-value heads that the layer had."""
    key: Tensor
    """(P,) int64: which of the K key heads each one has; ADDED for a head that gives zero."""
    value: Tensor
    """(P,) int64: which of the K value heads each one has; ADDED for a head that gives zero."""
    output: Tensor
    """(P, G, G) float64: [p, i, j] multiplies the output projection of query head i of the value's group in the new
    head that has the map of query head j of the key's group."""

    @property
    def num_kv_heads(self) -> int:
        """P."""
        return len(self.key)

    @property
    def num_heads(self) -> int:
        """Query heads, P * G."""
        return len(self.key) * self.output.shape[-1]

    def padded(self, length: int) -> "Heads":
        """The same with added heads, which give zero, up to `length` key-value heads.

        Raises:
            ValueError: there are more already.
        """
        if length < self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} heads do not fit into {length}")
        more = length - self.num_kv_heads
        added = self.key.new_full((more,), ADDED)
        return Heads(
            before=self.before,
            key=torch.cat([self.key, added]),
            value=torch.cat([self.value, added]),
            output=torch.cat([self.output, self.output.new_zeros(more, *self.output.shape[1:])]),
        )

    def of_keys(self, rows: Tensor) -> Tensor:
        """Rows that belong to key heads or to their queries, (K * n, ...) -> (P * n, ...), n rows a key head."""
        return self._pick(rows, self.key)

    def of_values(self, rows: Tensor) -> Tensor:
        """Rows that belong to value heads, (K * n, ...) -> (P * n, ...)."""
        return self._pick(rows, self.value)

    def of_outputs(self, weight: Tensor) -> Tensor:
        """Weight of the output projection, (out, K * G * d) -> (out, P * G * d), rounded once to its own type."""
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        split = exact.unflatten(1, (self.before, self.output.shape[-1], -1))[:, self.value.clamp(min=0)]
        return torch.einsum("pij,opid->opjd", self.output.to(split), split).flatten(1).to(weight.dtype)

    def _pick(self, rows: Tensor, index: Tensor) -> Tensor:
        if len(rows) % self.before:
            raise ValueError(f"{len(rows)} rows do not belong to {self.before} heads")
        picked = rows.unflatten(0, (self.before, -1))[index.clamp(min=0)]
        picked[index == ADDED] = 0
        return picked.flatten(0, 1)


def expand(mixing: Tensor, kv_heads: int | None = None, threshold: float = 0.0) -> Heads:
    """The heads that a layer with mixed maps needs. Pairs whose coefficients are all zero are left out.

    Args:
        mixing: M = I + alpha, (H, H), row g for output head g.
        kv_heads: K, which divides H; null is H, no grouped queries.
        threshold: coefficients that are smaller than this in absolute value count as zero, which changes the result.

    Raises:
        ValueError: `mixing` is not square, or K does not divide H.
    """
    heads = len(mixing)
    kv_heads = heads if kv_heads is None else kv_heads
    if mixing.shape != (heads, heads) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"cannot expand coefficients {list(mixing.shape)} over {kv_heads} key-value heads")
    kept = mixing.detach().double().cpu()
    kept = torch.where(kept.abs() < threshold, 0.0, kept)
    blocks = kept.unflatten(0, (kv_heads, -1)).unflatten(2, (kv_heads, -1))  # (K of value, G, K of key, G)
    blocks = blocks.permute(2, 0, 1, 3)  # (K of key, K of value, G of outputs, G of maps)
    key, value = (blocks != 0).flatten(2).any(-1).nonzero(as_tuple=True)
    return Heads(before=kv_heads, key=key, value=value, output=blocks[key, value])
