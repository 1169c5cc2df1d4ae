"""Everything but training: what a run would do, shown before it costs anything."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from coeft.adapt import count_parameters
from coeft.assemble import Assembled, describe_inputs, set_threads
from coeft.backbones._backbone import Backbone
from coeft.config import TrainConfig, to_yaml
from coeft.data._check import Place, name_of
from coeft.data._data import Data
from coeft.data._entries import cache_dir
from coeft.data._examples import columns_of, examples, picture
from coeft.data._source import listed
from coeft.errors import UserError
from coeft.memory import MIB, free_memory, longest, probe, step_memory
from coeft.run import check_run_dir
from coeft.tables import console
from coeft.train import prepare

SECTIONS = {
    "unreadable": "unreadable", "empty": "class folders without a sample", "suspicious": "suspicious labels",
}  # fmt: skip
CLASSES = 50  # that the summary names
LISTED = 20  # samples of a kind that it names


def dry_run(cfg: TrainConfig) -> None:
    """Print the config, the data, the backbone, what each method attached to, parameters, memory, one probe batch.

    What is wrong with single samples or class folders is named as with data.on_error=skip, also where it would stop the
    run: that is said at the end of the data's summary.

    Raises:
        UserError: whatever would stop the training before its first step.
    """
    check_run_dir(cfg)
    set_threads(cfg)
    out = console(sys.stderr)
    out.print(to_yaml(cfg), markup=False)

    def look(data: Data, backbone: Backbone) -> None:
        _print_data(data.summary(cfg.cv.folds), out)
        _print_sheet(data, cfg.seed, out)
        if cfg.data.on_error == "raise" and (problems := [*data.skipped, *data.empty]):
            raise UserError(listed("thing stops the run", "things stop the run", problems))

    lenient = cfg if cfg.data.on_error == "skip" else replace(cfg, data=replace(cfg.data, on_error="skip"))
    prepared = prepare(lenient, look=look)
    folds, built = prepared.folds, prepared.first
    for fold in folds:
        parts = {"train": fold.train, "val": fold.val, "held out": fold.heldout, "test": fold.test}
        out.print(f"fold {fold.index}: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items() if part))
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
    loss, _ = probe(built, longest(cfg, built, folds[0], 2))
    estimate, free = step_memory(cfg, built, folds[0]), free_memory()
    out.print(
        f"estimated peak memory of a step {estimate / MIB:,.0f} MiB above the program's own, free {free / MIB:,.0f} MiB"
    )
    if estimate > free:
        out.print("more than is free: lower trainer.micro_batch_size")
    for sentence in built.stack.starts():
        out.print(sentence, markup=False)
    out.print(f"probe batch: loss {loss:.4f}; every method was called")


def _print_stack(built: Assembled, out: Any) -> None:
    table = Table("method", "place", "route", "parameters", title="what each method attached to")
    for method, place, route, parameters in built.stack.report():
        table.add_row(method, place, route, f"{parameters:,}")
    if not built.stack.attachments:
        table.add_row("none", built.backbone.head, "the head alone", "")
    out.print(table)


def _print_data(summary: dict[str, Any], out: Any) -> None:
    splits = {split: counts for split, counts in summary["splits"].items() if counts is not None}
    labelled = any(counts["classes"] or counts.get("numbers") for counts in splits.values())
    table = Table("split", "samples", *(["labels"] if labelled else []), title="data")
    for split, counts in splits.items():
        table.add_row(split, f"{counts['samples']:,}", *([escape(_labels(counts))] if labelled else []))
    out.print(table)
    for split, counts in splits.items():
        if tokens := counts.get("tokens"):
            cut = f"{tokens['cut']} rows cut, the longest has {tokens['longest']}" if tokens["cut"] else "none cut"
            out.print(f"tokens of {split}: median {tokens['median']:g}, max {tokens['max']}; {cut}")
    if groups := [f"{split} {counts['groups']}" for split, counts in splits.items() if counts["groups"] is not None]:
        out.print(f"groups: {', '.join(groups)}")
    repeated = {where: count for where, count in summary["duplicates"].items() if count}
    counted = ", ".join(f"{count} in {where}" for where, count in repeated.items())
    out.print(f"samples that occur twice: {counted or 'none'}")
    for where in repeated:
        _print_list([f"{where}: {text}" for text in summary["duplicate_names"].get(where, [])], out)
    for key, what in SECTIONS.items():
        out.print(f"{what}: {len(summary[key])}")
        _print_list(summary[key], out)


def _labels(counts: dict[str, Any]) -> str:
    if numbers := counts.get("numbers"):
        return "mean {mean:.4g}, sd {std:.4g}, {min:.4g} to {max:.4g}".format(**numbers)
    classes = counts["classes"]
    shown = ", ".join(f"{name} {count}" for name, count in list(classes.items())[:CLASSES])
    return shown + (f" and {len(classes) - CLASSES} more" if len(classes) > CLASSES else "")


def _print_list(texts: list[str], out: Any) -> None:
    for text in texts[:LISTED]:
        out.print(f"  {text}", markup=False)
    if len(texts) > LISTED:
        out.print(f"  and {len(texts) - LISTED} more")


def _print_sheet(data: Data, seed: int, out: Any) -> None:
    """Draw the contact sheet into the cache, where samples are pictures: a dry run leaves nothing else behind."""
    if picture(data.train, 0) is None:
        return
    from coeft import plots  # matplotlib

    rows, more = examples(data, seed)
    columns = columns_of(data)

    def cell(place: Place | None) -> tuple[np.ndarray, str] | None:
        if place is None:
            return None
        part = data.parts[place[0]]
        assert part is not None
        pixels = picture(part, place[1])
        return None if pixels is None else (pixels, name_of(data, place))

    drawn = [plots.Row(label=row.label, cells=[cell(place) for place in row.places]) for row in rows]
    path = cache_dir() / "sheets" / f"{data.fingerprint}.png"
    title = "examples as the model gets them" + (f"; {more} classes are not shown" if more else "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.contact_sheet(drawn, columns, title, path)
    except OSError as error:
        out.print(f"no contact sheet: {error}", markup=False)
        return
    out.print(f"contact sheet: {path}", markup=False, soft_wrap=True)
