"""LoRA's modules, its choice of layers, and its stock peft form."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coeft.adapt import (
    PREFIX,
    AdaptedLinear,
    Attachment,
    Place,
    Update,
    adapt_linear,
    copy_into,
    in_blocks,
    linear_layers,
    matcher,
    update_dtype,
)
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError, near

if TYPE_CHECKING:
    from coeft.methods.lora import LoRA

# A module with a linear child of one of the first names is an attention; of its linear children these are projections.
QUERY = {"qkv", "q", "wq", "q_proj", "query"}
PROJECTIONS = QUERY | {"k", "v", "kv", "wk", "wv", "proj", "k_proj", "v_proj", "o_proj", "out_proj", "key", "value"}

# Attention classes of timm whose fused qkv has the rows of q first, then k's, then v's, each head after head; the
# class alone tells (tiny_vit's rows are interleaved by head). MaxViT's order depends on its head_first.
THIRDS = {
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.beit.Attention",
    "timm.models.cait.TalkingHeadAttn",
    "timm.models.eva.EvaAttention",
    "timm.models.maxxvit.AttentionCl",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
}


class LoRAUpdate(Update):
    """x -> (alpha / rank) * dropout(x) A^T B^T, for one weight of shape (d_out, d_in)."""

    def __init__(
        self, d_in: int, d_out: int, *, rank: int, alpha: float, dropout: float, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        # drawn on the CPU, so that a seed means the same factors on every device
        a = nn.init.kaiming_uniform_(torch.empty(rank, d_in, dtype=dtype), a=5**0.5)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, dtype=dtype, device=device))

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.lora_A.dtype)
        return F.linear(F.linear(self.dropout(input), self.lora_A), self.lora_B) * self.scale

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as stock peft stores them: (rank, d_in), (d_out, rank)."""
        return self.lora_A, self.lora_B

    def split(self, a: Tensor, b: Tensor, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of the parameter, relative to this module -> (parameter, what stock factors say it is)."""
        return {"lora_A": (self.lora_A, a), "lora_B": (self.lora_B, b)}


class SlicedLoRAUpdate(Update):
    """A LoRA of its own on some of the thirds q, k, v of a fused layer's outputs; the others get zero."""

    def __init__(self, slices: list[str], d_in: int, d_out: int, **options: Any) -> None:
        super().__init__()
        self.rows = d_out // 3
        for third in "qkv":  # registered in the order of the rows, whatever the order of the setting
            if third in slices:
                self.add_module(third, LoRAUpdate(d_in, self.rows, **options))

    def thirds(self) -> list[LoRAUpdate | None]:
        """The updates of q, k and v; None where there is none."""
        return [cast(LoRAUpdate | None, self._modules.get(third)) for third in "qkv"]

    def forward(self, input: Tensor) -> Tensor:
        parts = [update(input) if update is not None else None for update in self.thirds()]
        zeros = next(part for part in parts if part is not None).new_zeros(*input.shape[:-1], self.rows)
        return torch.cat([zeros if part is None else part for part in parts], dim=-1)

    def delta(self) -> Tensor:
        parts = [update.delta() if update is not None else None for update in self.thirds()]
        zeros = torch.zeros_like(next(part for part in parts if part is not None))
        return torch.cat([zeros if part is None else part for part in parts])

    def _blocks(self) -> dict[str, tuple[LoRAUpdate, slice, slice]]:
        """Slice -> (its update, its rows of the fused B, its columns of the fused B = rows of the fused A)."""
        blocks, start = {}, 0
        for i, (third, update) in enumerate(zip("qkv", self.thirds(), strict=True)):
            if update is not None:
                rank = update.lora_A.shape[0]
                blocks[third] = (update, slice(i * self.rows, (i + 1) * self.rows), slice(start, start + rank))
                start += rank
        return blocks

    def factors(self) -> tuple[Tensor, Tensor]:
        """One LoRA of the sum of the ranks with the same update: A stacked, B with a block per slice, else zero."""
        blocks = self._blocks().values()
        a = torch.cat([update.lora_A for update, _, _ in blocks])
        b = a.new_zeros(3 * self.rows, len(a))
        for update, rows, columns in blocks:
            b[rows, columns] = update.lora_B
        return a, b

    def split(self, a: Tensor, b: Tensor, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """The reverse of factors().

        Raises:
            UserError: B is not zero outside of the blocks, so that no LoRA on these slices equals it.
        """
        rest, found = b.clone(), {}
        for third, (update, rows, columns) in self._blocks().items():
            found[f"{third}.lora_A"] = (cast(Tensor, update.lora_A), a[columns])
            found[f"{third}.lora_B"] = (cast(Tensor, update.lora_B), b[rows, columns])
            rest[rows, columns] = 0
        if rest.any():
            raise UserError(
                f"peft.lora: the adapter's update of {name} is not one of its slices {', '.join(self._blocks())} "
                "alone: other entries of its lora_B are not zero; load it with peft.lora.qkv=null and its own rank"
            )
        return found


def attach(settings: "LoRA", backbone: Backbone) -> Attachment:
    """See LoRA.attach."""
    names = _targets(settings, backbone)
    fused = [name for name in names if _is_fused(name, backbone.model)]
    if settings.qkv is not None and not fused:
        raise UserError(
            f"peft.lora.qkv: none of the {len(names)} target layers of {backbone.name} is a fused qkv layer, whose "
            f"thirds q, k and v could be told apart ({_listed(names)}); set peft.lora.qkv=null and name the layers of "
            "q, k and v in peft.lora.target_modules"
        )
    adapted: dict[str, AdaptedLinear] = {}
    updates: dict[str, LoRAUpdate | SlicedLoRAUpdate] = {}
    for name in names:
        layer = adapt_linear(backbone.model, name)
        options: dict[str, Any] = {
            "rank": settings.rank,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "device": layer.weight.device,
            "dtype": update_dtype(layer.weight),
        }
        if settings.qkv is not None and name in fused:
            updates[name] = SlicedLoRAUpdate(settings.qkv, layer.in_features, layer.out_features, **options)
        else:
            updates[name] = LoRAUpdate(layer.in_features, layer.out_features, **options)
        layer.add(settings.kind, updates[name])
        adapted[name] = layer
    places = [
        Place(name, _route(settings, update), sum(p.numel() for p in update.parameters()))
        for name, update in updates.items()
    ]
    parameters = {
        f"{name}.updates.{settings.kind}.{key}": parameter
        for name, update in updates.items()
        for key, parameter in update.named_parameters()
    }
    return Attachment(
        method=settings.kind,
        places=places,
        parameters=parameters,
        probes=dict(adapted),
        pack=lambda: (_config(settings, backbone, updates), _tensors(updates)),
        unpack=lambda config, tensors: _unpack(settings, updates, config, tensors),
        merges=True,
    )


def _route(settings: "LoRA", update: Update) -> str:
    on = f" on {', '.join(name for name, _ in update.named_children())}" if isinstance(update, SlicedLoRAUpdate) else ""
    return f"rank {settings.rank}{on}"


def _targets(settings: "LoRA", backbone: Backbone) -> list[str]:
    """Names of the linear layers to adapt, in the order of the model's modules."""
    layers = linear_layers(backbone)
    where = "peft.lora.target_modules"
    if settings.target_modules is None:
        names = _attention_projections(backbone, list(layers))
        if not names:
            raise UserError(
                f"{where}: no attention with projections of its own was found in {backbone.name}; name the layers: "
                f"{_hint('', layers)}"
            )
        return _chosen(names, settings, backbone, "the attention projections")
    matched: set[str] = set()
    for pattern in settings.target_modules:
        expression = matcher(pattern, where)
        found = [name for name in layers if expression.search(name)]
        if not found:
            raise UserError(
                f"{where}: {pattern!r} matches no linear layer of {backbone.name}; {_hint(pattern, layers)}"
            )
        matched.update(_chosen(found, settings, backbone, f"{where}: the layers that {pattern!r} matches"))
    return [name for name in layers if name in matched]


def _chosen(names: list[str], settings: "LoRA", backbone: Backbone, what: str) -> list[str]:
    chosen = in_blocks(names, backbone, settings.layers, "peft.lora.layers")
    if not chosen:
        raise UserError(f"{what} ({_listed(names)}) are all outside of peft.lora.layers={settings.layers}")
    return chosen


def _attention_projections(backbone: Backbone, layers: list[str]) -> list[str]:
    """Projections of the attention sites; without any, of the modules in the blocks that look like attention."""
    children: dict[str, set[str]] = {}
    for name in layers:
        parent, _, child = name.rpartition(".")
        children.setdefault(parent, set()).add(child)
    inside = [site.name for site in backbone.sites] or [
        parent for parent in children if any(parent.startswith(f"{block}.") for block in backbone.blocks)
    ]
    attention = {parent for parent in inside if children.get(parent, set()) & QUERY}
    return [name for name in layers if name.rpartition(".")[0] in attention and name.rpartition(".")[2] in PROJECTIONS]


def _is_fused(name: str, model: nn.Module) -> bool:
    """Whether a layer's outputs are q, k and v, in thirds in this order."""
    parent = model.get_submodule(name.rpartition(".")[0])
    layer = model.get_submodule(name)
    kind = f"{type(parent).__module__}.{type(parent).__qualname__}"
    if name.rpartition(".")[2] != "qkv" or not isinstance(layer, nn.Linear) or layer.out_features % 3:
        return False
    return kind in THIRDS and not getattr(parent, "head_first", False)


def _hint(pattern: str, layers: Mapping[str, nn.Linear]) -> str:
    return f"{near(pattern, layers)} ({len(layers)} linear layers)"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _tensors(updates: Mapping[str, LoRAUpdate | SlicedLoRAUpdate]) -> dict[str, Tensor]:
    tensors = {}
    for name, update in updates.items():
        a, b = update.factors()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().clone()
    return tensors


def _config(
    settings: "LoRA", backbone: Backbone, updates: Mapping[str, LoRAUpdate | SlicedLoRAUpdate]
) -> dict[str, Any]:
    """What stock peft (0.18 and later) needs to build the same updates; JSON values only."""
    model = backbone.model
    # A LoRA of another rank than the others (slices) keeps the scale alpha / rank by an alpha of the same proportion.
    ranks = {name: update.factors()[0].shape[0] for name, update in updates.items()}
    usual = min(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": backbone.name,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _number(settings.alpha * usual / settings.rank),
        "rank_pattern": {_anchored(name): rank for name, rank in others.items()},
        "alpha_pattern": {
            _anchored(name): _number(settings.alpha * rank / settings.rank) for name, rank in others.items()
        },
        "lora_dropout": settings.dropout,
        "target_modules": _target_modules(list(updates), model),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    if any(_bias_was_joined(model, name) for name in updates):
        # Stock peft cannot switch timm's attention to call its wrapped qkv; an unknown key makes it say so.
        config["set_qkv_bias_separate_of_the_attention_to_true"] = True
    return config


def _bias_was_joined(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    joined = isinstance(layer, AdaptedLinear) and layer.parent_bias_separate is False
    return joined and getattr(parent, "q_bias", None) is not None


def _number(value: float) -> int | float:
    """Whole numbers as int: peft's lora_alpha is one."""
    return int(value) if float(value).is_integer() else value


def _anchored(name: str) -> str:
    """A key of peft's rank_pattern for one layer: peft matches `(.*\\.)?(KEY)$`, so that a bare name hits suffixes."""
    return f"^{re.escape(name)}"


def _target_modules(names: list[str], model: nn.Module) -> list[str] | str:
    """Names as a list, or one regular expression where peft would take other modules for them, by their endings."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) for name, _ in model.named_modules() if name not in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _unpack(
    settings: "LoRA",
    updates: Mapping[str, LoRAUpdate | SlicedLoRAUpdate],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill the factors from stock peft's form, of which this stack must have the same layers, ranks and scales."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft.lora: the adapter is of peft_type {config.get('peft_type')!r}, not LORA")
    wanted: dict[str, Tensor] = {}
    for name, update in updates.items():
        a, b = update.factors()
        wanted[f"{PREFIX}{name}.lora_A.weight"], wanted[f"{PREFIX}{name}.lora_B.weight"] = a.detach(), b.detach()
    copies = {key: torch.empty_like(tensor) for key, tensor in wanted.items()}
    copy_into(copies, tensors, "peft.lora")  # checks names and shapes
    for name in updates:
        rank = copies[f"{PREFIX}{name}.lora_A.weight"].shape[0]
        scale = _scale(config, name)
        if not abs(scale - settings.alpha / settings.rank) <= 1e-9 * scale:
            raise UserError(
                f"peft.lora: the adapter scales its update of {name} by {scale:g} (alpha {scale * rank:g} for rank "
                f"{rank}), not by {settings.alpha / settings.rank:g}; set peft.lora.alpha={scale * settings.rank:g}"
            )
    pairs = [
        pair
        for name, update in updates.items()
        for pair in update.split(
            copies[f"{PREFIX}{name}.lora_A.weight"], copies[f"{PREFIX}{name}.lora_B.weight"], name
        ).values()
    ]
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


def _scale(config: Mapping[str, Any], name: str) -> float:
    """The factor that stock peft gives the update of a layer under this adapter_config.json."""

    def pattern(table: str, usual: str, default: float) -> float:
        for key, value in (config.get(table) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return float(value)
        return float(config.get(usual, default))

    rank, alpha = pattern("rank_pattern", "r", 8), pattern("alpha_pattern", "lora_alpha", 8)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
