"""LoRA's modules, its choice of layers, and its stock peft form."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coeft.adapt import PREFIX, Attachment, copy_into
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.methods._weights import attachment, place_updates
from coeft.patterns import compiled
from coeft.stored import is_number
from coeft.targets import weight_targets
from coeft.weights import QKV, Adapted, Addition, Sliced, Stage, Update, in_type

if TYPE_CHECKING:
    from coeft.methods.lora import LoRA


class LoRAUpdate(Addition):
    """x -> (alpha / rank) * dropout(x) A^T B^T, for one weight of shape (d_out, d_in)."""

    def __init__(self, weight: Tensor, *, rank: int, alpha: float, dropout: float, rslora: bool = False) -> None:
        super().__init__()
        d_out, d_in = weight.shape
        self.scale = alpha / (rank**0.5 if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.drops = dropout > 0
        # drawn on the CPU, so that a seed means the same factors on every device
        a = nn.init.kaiming_uniform_(torch.empty(rank, d_in, dtype=weight.dtype), a=5**0.5)
        self.lora_A = nn.Parameter(a.to(weight.device))
        self.lora_B = nn.Parameter(weight.new_zeros(d_out, rank))

    def add(self, input: Tensor) -> Tensor:
        return self.low_rank(self.drop(in_type(input, self.lora_A)))

    def low_rank(self, input: Tensor) -> Tensor:
        """add() of inputs that dropout has seen."""
        return F.linear(F.linear(input, self.lora_A) * self.scale, self.lora_B)  # the scale on the smaller tensor

    def drop(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(input))

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A * self.scale


class DoRAUpdate(LoRAUpdate):
    """W -> m * (W + dW) / |W + dW|, m and the norms by rows of W (d_out, d_in), dW that of LoRA."""

    adds = False

    def __init__(self, weight: Tensor, **options: Any) -> None:
        super().__init__(weight, **options)
        self.magnitude = nn.Parameter(weight.norm(dim=1))

    def gain(self, before: Tensor) -> Tensor:
        """m / |W + dW|, (d_out,); the norm is a constant in the backward pass (the paper's section 4.3)."""
        with torch.no_grad():
            norm = (before + self.delta().to(before)).norm(dim=1)
        return self.magnitude / norm

    def forward(self, input: Tensor, before: Stage) -> Tensor:
        gain, outputs = self.gain(before.weight()), before(input)
        dropped = self.drop(in_type(input, self.lora_A))
        inner = before(dropped) if self.drops and self.training else outputs
        return outputs + (gain - 1) * inner + gain * self.low_rank(dropped)

    def weight(self, before: Tensor) -> Tensor:
        return self.gain(before)[:, None] * (before + self.delta().to(before))


Parts = Mapping[str, tuple[LoRAUpdate, slice, slice]]


def slices(update: Sliced) -> Parts:
    """q, k or v -> (its update, its rows of the fused B, its columns of the fused B = rows of the fused A)."""
    blocks, start = {}, 0
    for i, (third, part) in enumerate(zip(QKV, update.thirds(), strict=True)):
        if part is not None:
            lora = cast(LoRAUpdate, part)
            rank = lora.lora_A.shape[0]
            blocks[third] = (lora, slice(i * update.rows, (i + 1) * update.rows), slice(start, start + rank))
            start += rank
    return blocks


def factors(update: Update) -> tuple[Tensor, Tensor]:
    """A and B as stock peft stores them: (rank, d_in), (d_out, rank).

    Slices become one LoRA of the sum of the ranks with the same update: A stacked, B with a block per slice, else zero.
    """
    if not isinstance(update, Sliced):
        lora = cast(LoRAUpdate, update)
        return lora.lora_A, lora.lora_B
    blocks = slices(update).values()
    a = torch.cat([part.lora_A for part, _, _ in blocks])
    b = a.new_zeros(3 * update.rows, len(a))
    for part, rows, columns in blocks:
        b[rows, columns] = part.lora_B
    return a, b


def split(update: Update, a: Tensor, b: Tensor, name: str, method: str) -> list[tuple[Tensor, Tensor]]:
    """The reverse of factors(): pairs of a parameter and what stock factors say it is.

    Raises:
        UserError: B of slices is not zero outside of the blocks, so that no LoRA on these slices equals it.
    """
    if not isinstance(update, Sliced):
        lora = cast(LoRAUpdate, update)
        return [(lora.lora_A, a), (lora.lora_B, b)]
    blocks, rest, found = slices(update), b.clone(), []
    for part, rows, columns in blocks.values():
        found += [(cast(Tensor, part.lora_A), a[columns]), (cast(Tensor, part.lora_B), b[rows, columns])]
        rest[rows, columns] = 0
    if rest.any():
        raise UserError(
            f"peft.{method}: the adapter's update of {name} is not one of its slices {', '.join(blocks)} "
            f"alone: other entries of its lora_B are not zero; load it with peft.{method}.qkv=null and its own rank"
        )
    return found


def attach(settings: "LoRA", backbone: Backbone) -> Attachment:
    """See LoRA.attach."""
    for name in weight_targets(settings, backbone):
        if getattr(backbone.model.get_submodule(name), "groups", 1) > 1:
            raise UserError(
                f"peft.{settings.name}: {name} is a grouped convolution, for which stock peft has no LoRA; leave it out"
            )
    updates = place_updates(
        settings,
        backbone,
        lambda weight: (DoRAUpdate if settings.dora else LoRAUpdate)(
            weight, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, rslora=settings.rslora
        ),
    )
    model_type = type(backbone.model)  # asked for now: trainer.strategy=fsdp puts a subclass in its place
    return attachment(
        settings,
        backbone,
        updates,
        lambda update: f"rank {settings.rank}{', magnitudes' if settings.dora else ''}",
        pack=lambda: (
            _config(settings, backbone, updates, model_type),
            {key: value.cpu().clone() for key, value in _stock(backbone, updates).items()},
        ),
        unpack=lambda config, tensors: _unpack(settings, backbone, updates, config, tensors),
    )


def _stock(backbone: Backbone, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Every factor as stock peft names and shapes it; of a convolution (rank, d_in, k, k) and (d_out, rank, 1, 1)."""
    tensors = {}
    for name, update in updates.items():
        a, b = (factor.detach() for factor in factors(update))
        weight = cast(Tensor, backbone.model.get_submodule(name).weight)
        if weight.dim() > 2:
            a, b = a.view(len(a), *weight.shape[1:]), b[..., None, None]
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
        if isinstance(update, DoRAUpdate):
            magnitude = update.magnitude.detach()
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = (
                magnitude if weight.dim() == 2 else magnitude[None, :, None, None]
            )
    return tensors


def _config(settings: "LoRA", backbone: Backbone, updates: Mapping[str, Update], model_type: type) -> dict[str, Any]:
    """What stock peft (0.18 and later) needs to build the same updates; JSON values only."""
    model = backbone.model
    # A LoRA of another rank than the others (slices) keeps the scale alpha / rank by an alpha of the same proportion.
    ranks = {name: factors(update)[0].shape[0] for name, update in updates.items()}
    usual = min(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": model_type.__name__, "parent_library": model_type.__module__},
        "base_model_name_or_path": backbone.name,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _number(_alpha(settings, usual)),
        "rank_pattern": {_anchored(name): rank for name, rank in others.items()},
        "alpha_pattern": {_anchored(name): _number(_alpha(settings, rank)) for name, rank in others.items()},
        "lora_dropout": settings.dropout,
        "target_modules": stock_targets(list(updates), model),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
    }
    if any(bias_was_joined(model, name) for name in updates):
        # Stock peft cannot switch timm's attention to call its wrapped qkv; an unknown key makes it say so.
        config["set_qkv_bias_separate_of_the_attention_to_true"] = True
    return config


def _alpha(settings: "LoRA", rank: int) -> float:
    """The alpha that scales an update of this rank as the setting's alpha does one of the setting's rank."""
    proportion = rank / settings.rank
    return settings.alpha * (proportion**0.5 if settings.rslora else proportion)


def bias_was_joined(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    joined = isinstance(layer, Adapted) and layer.parent_bias_separate is False
    return joined and getattr(parent, "q_bias", None) is not None


def _number(value: float) -> int | float:
    """Whole numbers as int: peft's lora_alpha is one."""
    return int(value) if float(value).is_integer() else value


def _anchored(name: str) -> str:
    """A key of peft's rank_pattern for one layer: peft matches `(.*\\.)?(KEY)$`, so that a bare name hits suffixes."""
    return f"^{re.escape(name)}"


def stock_targets(names: list[str], model: nn.Module) -> list[str] | str:
    """Names as a list, or one regular expression where peft would take other modules for them, by their endings."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) for name, _ in model.named_modules() if name not in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _unpack(
    settings: "LoRA",
    backbone: Backbone,
    updates: Mapping[str, Update],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill the factors from stock peft's form, of which this stack must have the same layers, ranks and scales."""
    where = f"peft.{settings.name}"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: the adapter is of peft_type {config.get('peft_type')!r}, not LORA")
    if bool(config.get("use_dora")) != settings.dora:
        raise UserError(f"{where}: the adapter has use_dora={config.get('use_dora')}; set {where}.dora to the same")
    copies = {key: torch.empty_like(tensor) for key, tensor in _stock(backbone, updates).items()}
    copy_into(copies, tensors, where)  # checks names and shapes
    for name in updates:
        rank = copies[f"{PREFIX}{name}.lora_A.weight"].shape[0]
        scale, per = _scale(config, name, where), settings.rank**0.5 if settings.rslora else settings.rank
        if not abs(scale - settings.alpha / per) <= 1e-9 * scale:
            raise UserError(
                f"{where}: the adapter scales its update of {name} by {scale:g} (alpha {scale * rank:g} for rank "
                f"{rank}), not by {settings.alpha / per:g}; set {where}.alpha={scale * per:g}"
            )
    pairs = []
    for name, update in updates.items():
        a, b = copies[f"{PREFIX}{name}.lora_A.weight"], copies[f"{PREFIX}{name}.lora_B.weight"]
        pairs += split(update, a.flatten(1), b.flatten(1), name, settings.name)
        if isinstance(update, DoRAUpdate):
            pairs.append((update.magnitude, copies[f"{PREFIX}{name}.lora_magnitude_vector"].flatten()))
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


def _scale(config: Mapping[str, Any], name: str, where: str) -> float:
    """The factor that stock peft gives the update of a layer under this adapter_config.json."""

    def pattern(table: str, usual: str) -> float:
        patterns = config.get(table) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{where}: {table} must be a mapping from patterns to numbers, not {patterns!r}")
        for key, value in patterns.items():
            if compiled(key, f"{where}: {table}") and re.match(rf"(.*\.)?({key})$", name):
                return number(table, value)
        return number(usual, config.get(usual, 8))

    def number(key: str, value: Any) -> float:
        if not is_number(value) or value <= 0:
            raise UserError(f"{where}: the adapter's {key} must be a positive number, not {value!r}")
        return float(value)

    rank, alpha = pattern("rank_pattern", "r"), pattern("alpha_pattern", "lora_alpha")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
