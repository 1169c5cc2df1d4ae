"""LoRA: low-rank updates of frozen linear layers.

    y = x W^T + b + (alpha / rank) * dropout(x) A^T B^T        A (rank, d_in), B (d_out, rank)

What it trains   A and B of every target layer: rank * (d_in + d_out) parameters each; on a slice of a fused qkv
                 rank * (d_in + d_out / 3). W and b stay frozen.
Start            A Kaiming-uniform (a = sqrt 5), B zero: the model starts exactly at the pretrained one.
Where            The query, key, value and output projections of every attention; `target_modules` and `layers`
                 choose others. One LoRA over a whole fused qkv, as stock peft does, or with `qkv: [q, v]` one on
                 each of these slices.
When to take it  The default for most data: it reaches every weight, and merges into W, so inference costs nothing.
                 With very little data coeff or bitfit, with far fewer parameters, may do as well.
Source           Hu et al. 2021, arXiv:2106.09685, section 4.1; start as in microsoft/LoRA's loralib.
Departures       None. Slices of a fused qkv are separate LoRAs, each with its own A (and dropout mask).
Portable form    peft_type LORA, loaded by stock peft; slices are written as one LoRA of a higher rank.
Checked against  peft's LoraConfig: outputs, gradients, merged weights, files (tests/parity/test_lora.py).
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError
from coeft.methods._settings import MethodSettings

if TYPE_CHECKING:
    from coeft.adapt import Attachment
    from coeft.backbones._backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class LoRA(MethodSettings):
    """Settings of LoRA; `layers` counts the backbone's blocks."""

    kind: str = "lora"
    rank: int = 8
    """Rank of every update, 1 or more."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank, positive."""
    dropout: float = 0.0
    """Probability of zeroing an input of A in training, in [0, 1)."""
    target_modules: list[str] | None = None
    """Regular expressions: a linear layer is adapted when one is found anywhere in its full name (re.search), so
    `attn\\.proj$` or just `qkv`; each must match at least one. Null: the projections of every attention. The head
    and layers that are not linear, such as a patch embedding, are never adapted."""
    qkv: list[str] | None = None
    """Which of q, k and v of a fused qkv layer get a LoRA each; null is one LoRA over the whole layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"peft.lora.rank must be a whole number, 1 or more, not {self.rank!r}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"peft.lora.alpha must be positive, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"peft.lora.dropout must be in [0, 1), not {self.dropout}")
        given: dict[str, Any] = {"target_modules": self.target_modules, "qkv": self.qkv}
        for name, value in given.items():
            if value is not None and (isinstance(value, str) or not all(isinstance(item, str) for item in value)):
                raise UserError(f"peft.lora.{name} must be a list of texts, or null, not {value!r}")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("peft.lora.target_modules is empty: LoRA would attach to nothing; null takes the default")
        for pattern in self.target_modules or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"peft.lora.target_modules: {pattern!r} is not a regular expression: {error}") from None
        if self.qkv is not None:
            if not self.qkv or len(set(self.qkv)) < len(self.qkv) or not set(self.qkv) <= {"q", "k", "v"}:
                raise UserError(f"peft.lora.qkv must name some of q, k and v, each once, or be null, not {self.qkv}")

    def attach(self, backbone: "Backbone") -> "Attachment":
        """Add an update to every target layer.

        Raises:
            UserError: a pattern matches no linear layer, or no target is a fused qkv although `qkv` is set.
        """
        from coeft.methods._lora import attach

        return attach(self, backbone)
