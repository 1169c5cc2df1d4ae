"""Metrics of a finished run, on its own held-out data or on other data."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from coeft.assemble import encoder, restore, set_threads, settle
from coeft.config import NOTHING, Allowed, TrainConfig, apply_overrides
from coeft.data._data import Data, load_data
from coeft.data._folds import make_folds
from coeft.data._part import Part
from coeft.environment import changed_data, warn_of_changes
from coeft.errors import UserError
from coeft.run import Run
from coeft.stored import read_environment
from coeft.tables import console
from coeft.train import mean_metrics, measure

log = logging.getLogger("coeft")


def evaluate(path: str | Path, overrides: Mapping[str, Any], *, allowed: Allowed = NOTHING) -> dict[str, Any]:
    """Measure a run again: {"heldout", "validation", "test"} with metrics or None, each the mean over its models.

    Without overrides these are the data of the run: every fold's held-out part with that fold's model, and the test
    split; the validation part where there is neither. With data overrides, the models are measured on the test split of
    that data, or on all of it when it has none; its classes must be among the run's.

    Args:
        path: a run directory.
        overrides: dotted keys under data. and trainer. with their values.
        allowed: what the user has allowed the run's config.

    Raises:
        UserError: no complete run, a key outside data and trainer, or data with other classes.
    """
    run = Run.open(path, allowed=allowed)
    if run.members:
        raise UserError(f"{run.path} is a suite; evaluate one of its runs: {', '.join(run.members)}")
    cfg = apply_overrides(run.config, overrides, allowed=("data", "trainer"))
    if overrides.get("trainer.devices", 1) != 1:
        raise UserError("trainer.devices: coeft eval measures on one device; leave it out")
    before = read_environment(run.path)
    set_threads(cfg, before["threads"])
    warn_of_changes(run.path, before, "figures may differ in their last digits")
    heldout: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    other = any(key.split(".")[0] == "data" for key in overrides)
    data: Data | None = None
    for fold in run.folds or [0]:
        built, class_names = restore(run.config, run.adapter(fold if run.folds else None))
        settle(built)
        if data is None:
            data = load_data(
                cfg.data,
                seed=cfg.seed,
                encoder=encoder(cfg, built.backbone),
                target=cfg.task.target,
                group=cfg.cv.group,
            )
            parts = [] if other else make_folds(data, cfg.cv, cfg.seed)
            if not other and (change := changed_data(before, data)):
                log.warning("%s was made with other data: %s", run.path, change)
        if other:
            test.append(measure(cfg, built, _matched(data, class_names))[0])
            continue
        part = parts[fold]
        if part.heldout is not None:
            heldout.append(measure(cfg, built, part.heldout)[0])
        if part.test is not None:
            test.append(measure(cfg, built, part.test)[0])
        if part.heldout is None and part.test is None and part.val is not None:
            validation.append(measure(cfg, built, part.val)[0])
    results = {
        "heldout": mean_metrics(heldout) if heldout else None,
        "validation": mean_metrics(validation) if validation else None,
        "test": mean_metrics(test) if test else None,
    }
    _print(cfg, results)
    return results


def _matched(data: Data, class_names: list[str]) -> Part:
    """The part of other data to measure on, its labels in the run's order of classes."""
    part = data.test if data.test is not None else data.train
    unknown = [name for name in data.class_names if name not in class_names]
    if unknown:
        raise UserError(
            f"the data has classes the run was not trained on: {', '.join(unknown[:5])}; "
            f"it knows {', '.join(class_names[:20])}"
        )
    if not class_names:
        return part
    order = [class_names.index(name) for name in data.class_names]
    if part.labels.ndim > 1:
        labels = np.zeros((len(part), len(class_names)), part.labels.dtype)
        labels[:, order] = part.labels
        return replace(part, labels=labels)
    return replace(part, labels=torch.tensor(order).numpy()[part.labels])


def _print(cfg: TrainConfig, results: Mapping[str, Mapping[str, Any] | None]) -> None:
    table = Table(title=f"{cfg.recipe or cfg.data.kind}")
    columns = [name for name, metrics in results.items() if metrics]
    table.add_column("metric")
    for name in columns:
        table.add_column(name.replace("heldout", "held out"), justify="right")
    scores = [results[name] or {} for name in columns]
    for metric, value in (scores[0] if scores else {}).items():
        if isinstance(value, float):
            table.add_row(metric, *(f"{metrics[metric]:.4f}" for metrics in scores))
    console(sys.stderr).print(table)
