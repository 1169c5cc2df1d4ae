"""Predictions of a finished run for files, folders, tables and texts, as CSV."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coeft.answer import Wishes, answer
from coeft.assemble import encoder, make_trainer, restore, set_threads, settle
from coeft.config import NOTHING, Allowed, TrainConfig
from coeft.data._data import load_inputs
from coeft.data._images import image_inputs
from coeft.data._inputs import text_inputs
from coeft.data._module import FoldData
from coeft.data._part import Part
from coeft.data._records import column_of, is_file, table_records, unlabelled
from coeft.data._source import Split
from coeft.errors import UserError
from coeft.run import Run


def predict(
    path: str | Path,
    inputs: Sequence[str],
    out: Path | None = None,
    *,
    fold: int | None = None,
    wishes: Mapping[str, Any] | None = None,
    allowed: Allowed = NOTHING,
) -> None:
    """Write input, prediction and the probability of each class as CSV to `out`, or to standard output.

    A language model continues prompts instead, see coeft.answer.

    Args:
        path: a run directory; of a cross-validation without a refit, the folds' probabilities are averaged.
        inputs: for models of text, see `text_inputs`; for models of images or sound, such files and folders, tables
            (.csv, .tsv, .jsonl) whose first column or "input" names files, or "-" for such names on standard input; for
            multiple choice, tables with the run's columns.
        fold: of a language model, which fold's.
        wishes: of a language model, how the text is made: fields of coeft.answer.Wishes.
        allowed: what the user has allowed the run's config.

    Raises:
        UserError: no complete run, an input that is missing or cannot be used, or `out` exists.
    """
    run = Run.open(path, allowed=allowed)
    if run.members:
        raise UserError(f"{run.path} is a suite; predict with one of its runs: {', '.join(run.members)}")
    if out is not None and out.expanduser().exists():
        raise UserError(f"--out: {out} exists; choose another file")
    if run.config.task.kind == "causal_lm":
        answer(run, inputs, out.expanduser() if out else None, fold=fold, wishes=Wishes(**wishes or {}))
        return
    if fold is not None or wishes:
        raise UserError("--fold, --max-new-tokens, --temperature, --top-p and --seed are for language models alone")
    set_threads(run.config)
    refit = (run.path / "adapter").is_dir()
    adapters = [run.adapter()] if refit or not run.folds else [run.adapter(fold) for fold in run.folds]
    shares: list[Tensor] = []
    part: Part | None = None
    for adapter in adapters:
        built, class_names = restore(run.config, adapter)
        settle(built)
        if part is None:
            encode = encoder(run.config, built.backbone)
            part = load_inputs(_inputs(run.config, inputs, encode.modality), encode, run.config.data.on_error)
        loader = FoldData.evaluation_loader(part, batch_size=run.config.data.batch_size, num_workers=0)
        logits = make_trainer(run.config, Path.cwd()).predict(built.module, dataloaders=loader)
        assert logits is not None
        task = built.module.task
        shares.append(task.scores(torch.cat([batch.cpu() for batch in logits])))  # type: ignore[union-attr]
    assert part is not None
    columns, cells = task.table(torch.stack(shares).mean(0), class_names)
    rows = [[name, *row] for name, row in zip(part.names, cells, strict=True)]
    header = ["input", *columns]
    if out is None:
        csv.writer(sys.stdout).writerows([header, *rows])
        return
    try:
        with out.expanduser().open("x", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror})") from error


def _inputs(cfg: TrainConfig, inputs: Sequence[str], modality: str) -> Split:
    """The samples to predict."""
    if cfg.task.target == "choice":
        return choice_inputs(cfg, inputs)
    if modality == "text":
        return text_inputs(inputs, cfg.data, cfg.task.target, cfg.data.on_error)
    names = list(expand(inputs))
    noun = "sound" if modality == "audio" else "image"
    if not names:
        raise UserError(f"nothing to predict: give {noun} files, folders, a table, or - for names on standard input")
    if modality == "audio":
        from coeft.data._audio import sound_inputs

        return sound_inputs(names)
    return image_inputs(names)


def choice_inputs(cfg: TrainConfig, names: Sequence[str]) -> Split:
    """The questions of tables.

    Raises:
        UserError: no table, or it lacks the run's columns of questions and choices.
    """
    fields = cfg.data.fields("text", "choice")
    records, labels = [], []
    for name in names:
        if not is_file(name):
            raise UserError(f"{name}: give a table (.csv, .tsv, .jsonl, .parquet) of questions with their choices")
        found = table_records(name)
        for column, _ in fields.values():
            column_of(found, [column], name)
        records += [{key: record.get(column) for key, (column, _) in fields.items()} for record in found]
        labels += [f"{name}:{number}" for number in range(1, len(found) + 1)]
    return unlabelled(records, labels)


def expand(inputs: Iterable[str]) -> Iterable[str]:
    """File and folder names out of what was given: tables and standard input are read."""
    for name in inputs:
        path = Path(name).expanduser()
        if name == "-":
            yield from filter(None, (line.strip() for line in sys.stdin))
        elif path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            yield from _column(path)
        else:
            yield name


def _column(path: Path) -> list[str]:
    """The image names in a table: its column "input", else its first; relative ones count from the table's folder."""
    import pandas as pd

    try:
        if path.suffix.lower() == ".jsonl":
            table = pd.read_json(path, lines=True, dtype=False)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from error
    if table.empty:
        raise UserError(f"{path}: the table has no rows")
    column = "input" if "input" in table else table.columns[0]
    missing = table.index[table[column].isna()]
    if len(missing):
        raise UserError(f"{path}: row {missing[0] + 1} has no value in column {column!r}")
    return [str(path.parent / Path(str(value)).expanduser()) for value in table[column]]
