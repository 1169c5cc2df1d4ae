"""A trained model as a folder of its own: what folds into the weights is folded, what does not is kept beside them.

Whatever is written is loaded again from the files, by the code that the model card gives, and its logits are compared
with those of the trained model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coeft import adapter_io
from coeft.adapt import Stack, merge
from coeft.attention.expansion import check_expandable, expand_backbone, mixing
from coeft.backbones import _stock
from coeft.backbones._backbone import Backbone
from coeft.edits import Edit
from coeft.errors import UserError
from coeft.expand import Heads
from coeft.model_card import standalone_card
from coeft.run import write_text
from coeft.weights import Adapted

PROBES = 4
TOKENS = 16
ROUND_OFF = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference of logits, over the largest logit or 1, that counts as round-off of a model of that type."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What head expansion costs, (before, after)."""

    heads: dict[str, tuple[int, int]]
    """Query heads of every attention layer."""
    parameters: tuple[int, int]
    flops: tuple[int, int]
    """Of one forward of the probe."""
    cache: tuple[int, int] | None
    """Bytes of the key-value cache for each token of a causal model."""
    probe: str
    """What the probe is, such as "4 images of 16 x 16"."""

    def lines(self) -> list[str]:
        """One sentence each."""
        counts = sorted(set(self.heads.values()))
        found = ", ".join(f"{before} -> {after}" for before, after in counts)
        shown = [
            f"heads of {len(self.heads)} attention layer{'s' if len(self.heads) > 1 else ''}: {found}",
            f"parameters: {_change(*self.parameters)}",
            f"floating-point operations for {self.probe}: {_change(*self.flops)}",
        ]
        if self.cache:
            shown.append(f"key-value cache in bytes a token: {_change(*self.cache)}")
        return shown


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} (x {after / max(1, before):.2f})"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was done to a model, for people."""

    folded: list[str]
    """Methods that are in the weights now."""
    kept: list[str]
    """Methods that stay apart and need coeft."""
    check: str
    """How far the logits of the files are from those of the trained model."""
    code: str
    """Lines that load the folder, run inside of it."""
    price: Price | None = None
    dropped: str = ""
    """What a threshold left out."""

    def lines(self) -> list[str]:
        """For the terminal and the card."""
        shown = [f"folded into the weights: {', '.join(self.folded) or 'nothing'}"]
        shown.append(
            f"kept beside them, needs coeft: {', '.join(self.kept)}" if self.kept else "kept beside them: nothing"
        )
        shown += [self.dropped] if self.dropped else []
        shown += self.price.lines() if self.price else []
        return [*shown, self.check]


def write_standalone(
    folder: Path,
    backbone: Backbone,
    stack: Stack,
    *,
    num_outputs: int,
    class_names: list[str],
    facts: Mapping[str, str],
    expand: bool = False,
    threshold: float = 0.0,
) -> Summary:
    """Write a model with its attached stack into an existing empty folder. The model is used up.

    Args:
        num_outputs: width of the head; 0 is none.
        facts: lines of the card on where the model comes from, name -> text.
        expand: fold coeff by head expansion instead of keeping it.
        threshold: coefficients that are smaller in absolute value are left out of the expansion.

    Raises:
        UserError: the expansion does not fit the model, or the files give other logits than the trained model.
    """
    model = backbone.model.eval()
    methods = [attachment.method for attachment in stack.attachments]
    if expand:
        _check_alone(stack)
        check_expandable(backbone)
    inputs, probe = probe_batch(backbone)
    wanted, flops = _run(model, inputs)
    parameters = _count(model)
    kept = merge(backbone, stack)
    heads: dict[str, Heads] = {}
    arguments: dict[str, Any] = {}
    dropped = ""
    if expand:
        dropped = _dropped(backbone, threshold) if threshold else ""
        heads, arguments = expand_backbone(backbone, threshold)
        kept = [a.method for a in stack.attachments if a.method in kept and a.kind != "coeff"]
    rest = Stack({method: stack.methods[method] for method in kept})
    rest.attachments = [attachment for attachment in stack.attachments if attachment.method in kept]
    _stock.save(backbone, folder, without=_apart(model, rest), class_names=class_names, expanded=arguments)
    loaded = _stock.load(backbone, folder, expanded=bool(arguments))
    price = None
    if kept:
        loaded = _keep(folder, backbone, rest, loaded, num_outputs, class_names)
    found, flops_after = _run(loaded, inputs)
    if expand:
        price = Price(
            heads={s.name: (s.num_heads, heads[s.name].num_heads) for s in backbone.sites if s.name in heads},
            parameters=(parameters, _count(loaded)),
            flops=(flops, flops_after),
            cache=_cache(backbone, heads),
            probe=probe,
        )
    summary = Summary(
        folded=[method for method in methods if method not in kept],
        kept=kept,
        check=_compare(wanted, found, _coarsest(loaded), probe, exact=not threshold),
        code=_stock.loading_code(backbone, expanded=bool(arguments), adapter=bool(kept)),
        price=price,
        dropped=dropped,
    )
    write_text(folder / "README.md", standalone_card(backbone, summary, facts))
    return summary


def probe_batch(backbone: Backbone) -> tuple[Tensor | dict[str, Any], str]:
    """Random inputs of a model, the same in every process: images, or arguments by name; and what they are."""
    draw = torch.Generator().manual_seed(0)
    first = next(backbone.model.parameters())
    if backbone.preprocessing is not None:
        height, width = backbone.preprocessing.image_size
        images = torch.randn(PROBES, len(backbone.preprocessing.mean), height, width, generator=draw).to(first)
        shown = f"{PROBES} random images of {height} x {width}"
        if backbone.kind != "hf":
            return images, shown
        return {"pixel_values": images, **getattr(backbone, "image_options", {})}, shown
    from coeft.attention.hf import probe_inputs

    inputs: dict[str, Any] = {}
    shown = f"{PROBES} random texts of {TOKENS} tokens"
    for name, like in probe_inputs(backbone.model).items():
        if like.is_floating_point():
            inputs[name] = torch.randn(PROBES, *like.shape[1:], generator=draw).to(like)
            shown = f"{PROBES} random inputs of {' x '.join(map(str, like.shape[1:]))}"
            continue
        words = cast(Any, backbone.model).config.get_text_config().vocab_size
        inputs[name] = torch.randint(words, (PROBES, TOKENS), generator=draw).to(like)
        inputs[name][:, -1] = like[0, -1]  # some classifiers look for the end of the text
    return inputs, shown


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[Tensor, int]:
    """Logits of a forward, and its floating-point operations."""
    # the counter sees matrix products, but not what is inside fused attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits, counter.get_total_flops()


def _coarsest(model: nn.Module) -> torch.dtype:
    """The type of a model's parameters in which round-off is largest."""
    types = {parameter.dtype for parameter in model.parameters()} & set(ROUND_OFF)
    return max(types, key=ROUND_OFF.__getitem__)


def _compare(wanted: Tensor, found: Tensor, dtype: torch.dtype, probe: str, *, exact: bool) -> str:
    """How far two batches of logits (..., outputs) of models of a type are apart, as a sentence.

    Raises:
        UserError: further than round-off, although nothing was left out.
    """
    largest = float(wanted.abs().max())
    apart = float((wanted.double() - found.double()).abs().max()) if wanted.shape == found.shape else float("inf")
    allowed = ROUND_OFF[dtype] * max(1.0, largest)
    if exact and not apart <= allowed:
        raise UserError(
            f"the exported files give other logits than the trained model: {apart:.2g} apart, where round-off of "
            f"{str(dtype).removeprefix('torch.')} explains {allowed:.2g}; nothing was exported"
        )
    same = int((wanted.argmax(-1) == found.argmax(-1)).sum())
    total = wanted[..., 0].numel()
    return (
        f"checked with {probe}: logits up to {largest:.3g}, largest difference {apart:.2g}, "
        f"the same first choice in {same} of {total}"
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _apart(model: nn.Module, rest: Stack) -> set[str]:
    """Names in the state dict of what belongs to the methods that stay apart."""
    updates = tuple(f"{name}.updates." for name, m in model.named_modules() if isinstance(m, Adapted))
    updates += tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Edit))
    owned = {name for attachment in rest.attachments for name in attachment.parameters}
    return owned | {name for name in model.state_dict() if name.startswith(updates)}


def _cache(backbone: Backbone, heads: Mapping[str, Heads]) -> tuple[int, int] | None:
    """Bytes of keys and values a token before and after, of the layers that look back only."""
    before = after = 0
    for site in backbone.sites:
        module = cast(Any, site.module)
        if backbone.kind == "hf" and getattr(module, "is_causal", False):
            each = 2 * module.head_dim * module.o_proj.weight.element_size()
            before, after = before + heads[site.name].before * each, after + heads[site.name].num_kv_heads * each
    return (before, after) if before else None


def _check_alone(stack: Stack) -> None:
    stay = [a.method for a in stack.attachments if not a.merges and a.kind != "coeff"]
    if stay:
        raise UserError(f"--coeff expand: {', '.join(stay)} cannot be folded into the weights; take --coeff keep")


def _dropped(backbone: Backbone, threshold: float) -> str:
    """What a threshold leaves out, as a sentence."""
    found = [m for site in backbone.sites if (m := mixing(site)) is not None]
    small = sum(int((m.abs() < threshold).sum()) for m in found)
    return f"left out by --threshold {threshold:g}: {small} of {sum(m.numel() for m in found)} coefficients"


def _keep(
    folder: Path, backbone: Backbone, rest: Stack, base: nn.Module, num_outputs: int, class_names: list[str]
) -> nn.Module:
    """Write the adapter of the methods that stay apart, made for the base model of the files; load it into that."""
    adapter = folder / "adapter"
    adapter_io.save_adapter(
        adapter,
        backbone,
        rest,
        base=adapter_io.fingerprint(base, backbone.heads),
        num_outputs=num_outputs,
        class_names=class_names,
        card=f"The part of the model above that needs coeft: {', '.join(rest.methods)}. See ../README.md.\n",
    )
    return adapter_io.load_adapter(base, adapter)
