"""Everything but training: what a run would do, shown before it costs anything."""

import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import Tensor

from coeft.adapt import count_parameters
from coeft.assemble import (
    Assembled,
    describe_inputs,
    make_trainer,
    micro_batch_size,
    set_threads,
)
from coeft.config import TrainConfig, to_yaml
from coeft.run import check_run_dir
from coeft.tables import console
from coeft.train import prepare


def dry_run(cfg: TrainConfig) -> None:
    """Print the config, the backbone, what each method attached to, parameters, memory, the data, one probe batch.

    Raises:
        UserError: whatever would stop the training before its first step.
    """
    check_run_dir(cfg)
    set_threads(cfg)
    out = console(sys.stderr)
    out.print(to_yaml(cfg), markup=False)
    prepared = prepare(cfg)
    data, folds, built = prepared.data, prepared.folds, prepared.first
    backbone = built.backbone
    counts = count_parameters(built.backbone, built.stack)
    out.print(f"backbone {backbone.name}: {len(backbone.blocks)} blocks, {len(backbone.sites)} attention sites")
    if backbone.refusal:
        out.print(f"attention methods: {backbone.refusal}", markup=False)
    out.print(f"{describe_inputs(backbone)}\n", markup=False)
    _print_stack(built, out)
    out.print(
        f"trainable {counts.trainable:,} (methods {counts.adapter:,}, head {counts.head:,}) "
        f"of {counts.total:,} parameters\n"
    )
    micro = micro_batch_size(cfg, make_trainer(cfg, Path.cwd()).num_devices)
    batch = folds[0].train.batch(range(min(2, len(folds[0].train))))
    loss, per_sample = probe(built, batch)
    estimate = memory_estimate(built, per_sample, micro)
    free = psutil.virtual_memory().available
    out.print(
        f"estimated peak memory of a step {estimate / 2**20:,.0f} MiB above the program's own, "
        f"free {free / 2**20:,.0f} MiB"
    )
    if estimate > free:
        out.print("more than is free: lower trainer.micro_batch_size")
    _print_data(data.summary(), folds, out)
    out.print(f"probe batch: loss {loss:.4f}; every method was called")


def probe(built: Assembled, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Loss of a batch in training mode, and bytes that one sample's forward saves for the backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in built.module.parameters()}
    built.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = built.module.task.loss(built.module(batch), batch, training=True)
    total = sum(size for pointer, size in saved.items() if pointer not in held)
    return float(loss.detach()), total // len(batch["labels"])


def memory_estimate(built: Assembled, per_sample: int, micro_batch: int) -> int:
    """Bytes of weights, gradients, two optimizer moments, and the activations of one micro-batch."""
    weights = sum(p.numel() * p.element_size() for p in built.module.parameters())
    trained = sum(p.numel() * p.element_size() for p in built.module.parameters() if p.requires_grad)
    return weights + 3 * trained + per_sample * micro_batch


def _print_stack(built: Assembled, out: Any) -> None:
    table = Table("method", "place", "route", "parameters", title="what each method attached to")
    for method, place, route, parameters in built.stack.report():
        table.add_row(method, place, route, f"{parameters:,}")
    if not built.stack.attachments:
        table.add_row("none", built.backbone.head, "the head alone", "")
    out.print(table)


def _print_data(summary: dict[str, Any], folds: list[Any], out: Any) -> None:
    splits = [counts for counts in summary["splits"].values() if counts is not None]
    labelled = any(counts["classes"] or counts.get("numbers") for counts in splits)
    table = Table("split", "samples", *(["labels"] if labelled else []), title="data")
    for split, counts in summary["splits"].items():
        if counts is None:
            continue
        classes = counts["classes"]
        shown = ", ".join(f"{name} {count}" for name, count in list(classes.items())[:20])
        more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
        if numbers := counts.get("numbers"):
            shown = "mean {mean:.4g}, sd {std:.4g}, {min:.4g} to {max:.4g}".format(**numbers)
        table.add_row(split, f"{counts['samples']:,}", *([shown + more] if labelled else []))
    out.print(table)
    for split, counts in summary["splits"].items():
        if counts and (tokens := counts.get("tokens")):
            cut = f"{tokens['cut']} rows cut, the longest has {tokens['longest']}" if tokens["cut"] else "none cut"
            out.print(f"tokens of {split}: median {tokens['median']:g}, max {tokens['max']}; {cut}")
    repeated = {where: count for where, count in summary["duplicates"].items() if count}
    out.print(
        f"samples that occur twice: {', '.join(f'{count} in {where}' for where, count in repeated.items()) or 'none'}"
    )
    for where in repeated:
        out.print(f"  {where}: {'; '.join(summary['duplicate_names'].get(where, []))}", markup=False)
    out.print(f"unreadable: {len(summary['unreadable'])}")
    for name in summary["unreadable"][:20]:
        out.print(f"  {name}", markup=False)
    for fold in folds:
        parts = {"train": fold.train, "val": fold.val, "held out": fold.heldout, "test": fold.test}
        out.print(f"fold {fold.index}: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items() if part))
