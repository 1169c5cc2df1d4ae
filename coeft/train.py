"""The composition root: train(cfg) runs one config from data to results.json."""

import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from rich.console import Console
from rich.progress import Progress, TaskID

from coeft import adapter_io, checkpoint, compiled, plots, ranks, sharding
from coeft.adapt import count_parameters
from coeft.assemble import (
    Assembled,
    all_take_part,
    assemble,
    build_backbone,
    calibrate,
    check_forward,
    describe_inputs,
    encoder,
    make_trainer,
    micro_batch_size,
    set_threads,
    settle,
    start_from,
)
from coeft.backbones._backbone import Backbone
from coeft.checkpoint import AtomicFiles, BestEpoch
from coeft.config import NOTHING, Allowed, TrainConfig, load_config
from coeft.data._check import fold_leakage
from coeft.data._data import NOUNS, Data, load_data
from coeft.data._folds import Fold, make_folds, refit_fold
from coeft.data._module import FoldData
from coeft.data._part import Part
from coeft.environment import changed_data, environment, machine, warn_of_changes
from coeft.errors import UserError
from coeft.faults import LogFile, lower, told
from coeft.frozen import Kept
from coeft.interrupt import Interrupted as Interrupted  # what train raises
from coeft.interrupt import interruptible
from coeft.lock import hold, was_killed
from coeft.loggers._findings import Boards, finish
from coeft.loggers._metrics_csv import MetricsCSV, cut
from coeft.memory import warn_of_memory
from coeft.model_card import model_card
from coeft.module import TuningModule
from coeft.precision import computing
from coeft.run import (
    LogFormat,
    check_run_dir,
    new_run_dir,
    no_run,
    peak_rss_mb,
    read_json,
    write_config,
    write_json,
    write_text,
)
from coeft.stored import check_fold, read_environment
from coeft.tables import print_folds
from coeft.tasks._task import Task

log = logging.getLogger("coeft")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A finished epoch, as a watcher sees it."""

    run_dir: Path
    fold: int
    epoch: int
    """Counted from 0."""
    metrics: dict[str, float]
    """What was logged last, such as val/accuracy."""


Watch = Callable[[Epoch], None]
"""Called after every epoch; may raise to stop the run, which `resume` continues from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fold, or one standard training, came to."""

    row: dict[str, Any]
    """The fold's entry in results.json."""
    test: dict[str, Any] | None
    counts: dict[str, int]
    fit_s: float
    samples_seen: int
    heldout: dict[str, Any] | None
    """All metrics on the held-out fold."""
    extras: dict[str, Any] | None
    """What the task has beyond numbers, such as the confusion matrix, on what the fold's value was measured."""
    validation: float | None = None
    """task.metric on the inner validation part at the picked epoch; None without such a part."""
    skipped_steps: int = 0
    """Optimizer steps that were left out because a loss or a gradient was not finite (trainer.on_nan=skip)."""

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """What a fold's fold.json holds.

        Raises:
            UserError: it is missing or damaged.
        """
        values = check_fold(read_json(path), str(path))
        known: dict[str, Any] = {spec.name: values.get(spec.name) for spec in fields(cls)}
        return cls(**known | {"skipped_steps": values.get("skipped_steps", 0)})  # older files lack it


def train(cfg: TrainConfig, *, watch: Watch | None = None) -> Path:
    """Train, evaluate and write one run (standard or k-fold); return its directory.

    With several cfg.trainer.devices a script needs `if __name__ == "__main__":` around what it does: the processes that
    are started import it.

    Args:
        watch: called after every epoch; whoever watches also reports, so the table of the folds is not printed.
    Raises:
        UserError: data, backbone, stack or run directory are not as the config says.
        Interrupted: stopped by the user, state saved.
    """
    started = time.monotonic()
    with ranks.launched(cfg.trainer):
        if ranks.is_first():
            check_run_dir(cfg)
        threads = set_threads(cfg, processes=ranks.count(cfg.trainer))
        prepared = prepare(cfg)
        if not ranks.is_first():  # of those that torchrun started; the first makes the directory and holds it
            return _run(cfg, ranks.from_first(Path.cwd), prepared, started, None)
        warn_of_memory(cfg, prepared.first, prepared.folds[0])
        with new_run_dir(cfg) as run_dir, interruptible(run_dir):
            with told(cfg, run_dir, "run"):
                write_config(run_dir / "config.yaml", cfg)
                write_json(run_dir / "environment.json", environment(prepared.data, threads))
            ranks.from_first(lambda: run_dir)
            return _run(cfg, run_dir, prepared, started, watch)


def resume(path: str | Path, *, watch: Watch | None = None, allowed: Allowed = NOTHING) -> Path:
    """Continue an interrupted run from its last finished epoch; return its directory.

    Args:
        watch: as of train.
        allowed: what the user has allowed the run's config.
    Raises:
        UserError: there is no run, it is complete, or its data changed since.
    """
    run_dir = Path(path).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise UserError(no_run(run_dir))
    cfg = load_config(run_dir / "config.yaml", allowed=allowed)
    if cfg.suite or cfg.seeds:
        from coeft.suite import resume_suite

        return resume_suite(run_dir, watch=watch, allowed=allowed)
    with ranks.launched(cfg.trainer):
        if not ranks.is_first():
            set_threads(cfg, ranks.from_first(lambda: 0))
            return _run(cfg, run_dir, prepare(cfg), time.monotonic(), None)
        return _resume_held(cfg, run_dir, watch)


def _resume_held(cfg: TrainConfig, run_dir: Path, watch: Watch | None) -> Path:
    killed = was_killed(run_dir)
    with hold(run_dir), interruptible(run_dir):
        if (run_dir / "results.json").exists():
            finish(cfg, run_dir)
            raise UserError(f"{run_dir} is complete; there is nothing to resume")
        if killed:
            log.warning(
                "%s: its last process was killed without a word, as the system does when memory runs out; in case it "
                "happens again: %s", run_dir, lower(cfg, run_dir),
            )  # fmt: skip
        return _resume(cfg, run_dir, watch)


def _resume(cfg: TrainConfig, run_dir: Path, watch: Watch | None) -> Path:
    started = time.monotonic()
    file = run_dir / "environment.json"
    before = read_environment(run_dir) if file.exists() else None
    threads = set_threads(cfg, before["threads"] if before else None, processes=ranks.count(cfg.trainer))
    ranks.from_first(lambda: threads)
    prepared = prepare(cfg)
    warn_of_memory(cfg, prepared.first, prepared.folds[0])
    if before is None:
        with told(cfg, run_dir, "run"):
            write_json(file, environment(prepared.data, threads))
    elif change := changed_data(before, prepared.data):
        raise UserError(
            f"{run_dir}: the data is not what the run began with ({change}); put it back, or start a new run"
        )
    elif warn_of_changes(run_dir, before, "what it comes to may not be what it would have come to"):
        with told(cfg, run_dir, "run"):
            write_json(file, {**before, "resumed": [*before.get("resumed", []), {**machine(), "threads": threads}]})
    return _run(cfg, run_dir, prepared, started, watch)


def _run(cfg: TrainConfig, run_dir: Path, prepared: "Prepared", started: float, watch: Watch | None) -> Path:
    with ranks.several(cfg, run_dir, _follow):
        _run_folds(cfg, run_dir, prepared, started, watch)
    return run_dir


def _follow(cfg: TrainConfig, run_dir: Path, join: Callable[[], None]) -> None:
    """What every process but the first does; all that it needs is in the cache by now."""
    prepared = prepare(cfg)
    join()
    _run_folds(cfg, run_dir, prepared, time.monotonic(), None)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that has passed every check before its first step; nothing is written yet."""

    data: Data
    folds: list[Fold]
    first: Assembled
    """The model of the first fold."""


def prepare(cfg: TrainConfig, *, look: Callable[[Data, Backbone], None] = lambda data, backbone: None) -> Prepared:
    """The data in the base model's size, how it is divided, and the first fold's model, which was tried.

    Args:
        look: gets the data before it is divided, and the base model.
    Raises:
        UserError: whatever would stop the training before its first step.
    """
    ranks.count(cfg.trainer)  # refuses devices that there are not
    if cfg.trainer.compile:
        compiled.check()
    backbone = build_backbone(cfg)
    with decoding(show=cfg.trainer.progress and sys.stderr.isatty() and ranks.is_first()) as progress:
        data = load_data(
            cfg.data,
            seed=cfg.seed,
            encoder=encoder(cfg, backbone),
            target=cfg.task.target,
            group=cfg.cv.group,
            progress=progress,
        )
    look(data, backbone)
    folds = make_folds(data, cfg.cv, cfg.seed)
    for warning in fold_leakage(data, folds):
        data.warnings.append(warning)
        log.warning("%s", warning)
    if cfg.cv.folds > 1 and cfg.cv.refit:
        folds.append(refit_fold(data, cfg.cv, cfg.seed))
    if cfg.trainer.patience is not None and any(fold.val is None for fold in folds):
        raise UserError("trainer.patience needs validation data: set cv.val_fraction, data.n_val or a validation split")
    processes = ranks.processes(cfg.trainer)
    _check_shares(cfg, folds, processes)
    first = _assemble_fold(cfg, backbone, data, folds[0])
    if cfg.trainer.strategy == "fsdp" and processes > 1:
        sharding.units(first.backbone, first.stack, processes)  # refuses what cannot be divided
    return Prepared(data=data, folds=folds, first=first)


def _check_shares(cfg: TrainConfig, folds: list[Fold], processes: int) -> None:
    """Refuse batches and parts of the data that cannot be divided among the processes.

    Raises:
        UserError: says which.
    """
    micro_batch_size(cfg, processes)
    for fold in folds:
        for name in ("val", "heldout", "test"):
            part = getattr(fold, name)
            if part is not None and len(part) < processes:
                raise UserError(
                    f"trainer.devices: the {name} part of fold {fold.index} has {len(part)} samples, "
                    f"fewer than the {processes} processes; lower trainer.devices"
                )


def _assemble_fold(cfg: TrainConfig, backbone: Backbone, data: Data, fold: Fold) -> Assembled:
    built = assemble(cfg, backbone, cfg.task.outputs(data.class_names), fold=fold.index)
    if (scale := built.module.task.scale(fold.train.labels)) is not None:
        backbone.rescale_head(*scale)
        built.module.task.use_scale(scale)
    built.module.task.use_labels(fold.train.labels, data.class_names)
    if cfg.init_from is not None:
        start_from(cfg, built)
    check_forward(built, fold.train)
    if cfg.init_from is None:
        calibrate(built, fold.train)
    return settle(built)


@contextmanager
def decoding(*, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function to report encoded samples to, and a bar for each part of the data that takes a while."""
    if not show:
        yield lambda part, done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(f"reading {part}", total=total)
            bars.update(tasks[part], completed=done)

        yield report


def _run_folds(cfg: TrainConfig, run_dir: Path, prepared: Prepared, started: float, watch: Watch | None) -> None:
    if not ranks.is_first():
        _all_folds(cfg, run_dir, prepared, None, None)
        return
    data = prepared.data
    with told(cfg, run_dir, "run"):
        handler = LogFile(run_dir / "log.txt", encoding="utf-8")
    handler.setFormatter(LogFormat())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    boards = Boards(cfg, run_dir)
    told_before = [*(f"unreadable, left out: {name}" for name in data.skipped), *data.empty, *data.warnings]
    for text in told_before:  # standard error has had the counts, or all, already
        handler.handle(log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None))
    try:
        stack = " + ".join(cfg.peft) or "head only"
        log.info("%s, %s, data %s", prepared.first.backbone.name, stack, cfg.data.kind)
        log.info("%s", describe_inputs(prepared.first.backbone))
        if prepared.first.backbone.hearing is not None:
            from coeft.hearing import show_sounds

            (run_dir / "plots").mkdir(exist_ok=True)
            show_sounds(prepared.first, data.train, data.class_names, cfg.seed, run_dir / "plots")
        outcomes = _all_folds(cfg, run_dir, prepared, watch, boards)
        task = prepared.first.module.task
        with told(cfg, run_dir, "results"):
            write_json(run_dir / "results.json", _results(cfg, run_dir, outcomes, task, data.class_names, started))
        boards.publish(run_dir)
        if watch is None:
            print_folds(read_json(run_dir / "results.json"), file=sys.stderr)
    finally:
        boards.close()
        log.removeHandler(handler)
        handler.close()


def _all_folds(
    cfg: TrainConfig, run_dir: Path, prepared: Prepared, watch: Watch | None, boards: Boards | None
) -> list[Outcome]:
    """Train and measure every fold that is not complete; `boards` are those of the first process."""
    outcomes = []
    kept = Kept(cfg, prepared.folds)
    for fold in prepared.folds:
        folder = fold_dir(run_dir, cfg, fold)
        if (folder / "fold.json").is_file():
            outcomes.append(Outcome.read(folder / "fold.json"))
            continue
        first = fold is prepared.folds[0]
        with told(cfg, run_dir, fold_name(cfg, fold)):
            built = prepared.first if first else _assemble_fold(cfg, build_backbone(cfg), prepared.data, fold)
            used = kept.use(built, fold)
            if cfg.trainer.compile:
                compiled.compile_blocks(built.backbone)
            outcomes.append(_fit_fold(cfg, run_dir, folder, used, built, prepared.data, watch, boards))
    return outcomes


def is_refit(cfg: TrainConfig, fold: Fold) -> bool:
    """Whether this is the model on all data that follows the folds of a cross-validation."""
    return cfg.cv.folds > 1 and fold.index >= cfg.cv.folds


def fold_name(cfg: TrainConfig, fold: Fold) -> str:
    """What messages call a fold."""
    if is_refit(cfg, fold):
        return "all data"
    return f"fold {fold.index + 1}/{cfg.cv.folds}" if cfg.cv.folds > 1 else "run"


def fold_dir(run_dir: Path, cfg: TrainConfig, fold: Fold) -> Path:
    """Where a fold keeps its checkpoints, adapter and plots: the run itself for standard training and the refit."""
    if cfg.cv.folds <= 1 or is_refit(cfg, fold):
        return run_dir
    return run_dir / f"fold_{fold.index}"


def _fit_fold(
    cfg: TrainConfig,
    run_dir: Path,
    folder: Path,
    fold: Fold,
    built: Assembled,
    data: Data,
    watch: Watch | None,
    boards: Boards | None,
) -> Outcome:
    counts = count_parameters(built.backbone, built.stack)
    name = fold_name(cfg, fold)
    noun = NOUNS[built.backbone.data_modality]
    log.info(
        "%s: %d training, %d validation %s; %s of %s parameters trained",
        name, len(fold.train), len(fold.val or []), noun, f"{counts.trainable:,}", f"{counts.total:,}",
    )  # fmt: skip
    for sentence in built.stack.starts():
        log.info("%s", sentence)
    if ranks.is_first():
        folder.mkdir(exist_ok=True)
    find_unused = ranks.place().world > 1 and not all_take_part(built, fold.train)
    if ranks.divided(cfg.trainer):
        sharding.shard(built.module)
        sharding.check_forward(built.module, fold.train.batch(range(min(2, len(fold.train)))))
    fitted = _fit(cfg, run_dir, folder, fold, built, watch, boards, find_unused=find_unused)
    parts = {"heldout": fold.heldout, "test": fold.test}
    if fold.heldout is None and fold.test is None:
        parts["val"] = fold.val  # nothing else to report on; the table says so
    scores = {name: measure(cfg, built, part) for name, part in parts.items() if part is not None}
    for part, (metrics, _) in scores.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"{metric} is {value} on the {part} part of fold {fold.index}, with the weights of epoch "
                    f"{fitted.epoch}: {_too_large(cfg)}"
                )
    measured, extras = next(iter(scores.values()), (None, None))
    heldout, test = (scores[name][0] if name in scores else None for name in ("heldout", "test"))
    held = fold.heldout if fold.heldout is not None else fold.test
    row = {
        "fold": fold.index,
        "value": measured[cfg.task.metric] if measured else None,
        "best_epoch": fitted.epoch,
        "n_train": len(fold.train),
        "n_val": len(fold.val) if fold.val is not None else 0,
        "n_test": len(held) if held is not None else 0,
    }
    outcome = Outcome(
        row=row,
        test=test,
        counts={"trainable": counts.trainable, "adapter": counts.adapter, "total": counts.total},
        fit_s=fitted.seconds,
        samples_seen=built.module.samples_seen,
        heldout=heldout,
        extras=extras,
        validation=fitted.score,
        skipped_steps=built.module.skipped_steps,
    )
    if boards is None:  # the first process writes
        return outcome
    for left in folder.glob(".adapter.*"):  # by a process that was killed
        shutil.rmtree(left)
    (folder / "plots").mkdir(exist_ok=True)
    plots.coefficients(built.stack, folder / "plots" / "coefficients.png")
    if extras and folder != run_dir:
        built.module.task.plot(extras, data.class_names, folder / "plots")
    adapter_io.save_adapter(
        folder / "adapter",
        built.backbone,
        built.stack,
        base=built.base,
        num_outputs=built.module.task.num_outputs,
        class_names=data.class_names,
        card=model_card(cfg, built, counts, row, data.class_names),
    )
    if outcome.skipped_steps:
        log.warning(
            "%s: %d optimizer steps were left out (trainer.on_nan=skip): a loss or a gradient was not finite",
            name, outcome.skipped_steps,
        )  # fmt: skip
    if row["value"] is not None:
        log.info("%s: %s %.4f (epoch %s)", name, cfg.task.metric, row["value"], fitted.epoch)
    write_json(folder / "fold.json", vars(outcome))
    if folder != run_dir:
        boards.publish(folder)
    return outcome


def _too_large(cfg: TrainConfig) -> str:
    """What to do about outputs that are not finite though the weights are."""
    return (
        f"lower optim.lr ({cfg.optim.lr:g}) or the learning rates of the methods, and look for values in the data that "
        "are too large; then start a new run"
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What training one fold came to."""

    epoch: int
    """The best, from 0."""
    score: float | None
    """Its validation metric."""
    seconds: float


def _fit(
    cfg: TrainConfig,
    run_dir: Path,
    folder: Path,
    fold: Fold,
    built: Assembled,
    watch: Watch | None,
    boards: Boards | None,
    *,
    find_unused: bool,
) -> Fitted:
    """Train one fold, from its last checkpoint if there is one, and leave the best epoch's weights in the model."""
    task, base = built.module.task, built.base["sample_sha256"]
    last = folder / "checkpoints" / checkpoint.LAST
    monitor = f"val/{task.metric}" if fold.val is not None else None
    best = BestEpoch(last.parent, monitor=monitor, mode=task.mode, base=base)
    done, finished = 0, False
    if last.is_file():
        saved = checkpoint.read(last, base)
        checkpoint.check_fit(saved, built.module, last)
        best.take_up(saved, built.module)
        built.module.on_load_checkpoint(saved)  # which Lightning does not call when nothing is left to train
        done = saved["epoch"] + 1
        finished = done >= cfg.trainer.max_epochs or saved["coeft"]["stopped"]
        del saved
    if ranks.is_first():
        cut_samples(folder / "samples.jsonl", first_epoch=done)
        cut(run_dir / "metrics.csv", fold=fold.index, first_epoch=done)
    if not finished:
        _train_epochs(cfg, run_dir, folder, fold, built, watch, boards, best, done, find_unused=find_unused)
    if monitor is not None and best.score is None:
        raise UserError(
            f"{monitor} was not finite after any epoch of fold {fold.index}, from epoch 0 on: {_too_large(cfg)}"
        )
    epoch = checkpoint.restore(best.best, built.module, base)
    score = None if best.score is None else round(best.score, 7)
    return Fitted(epoch=epoch, score=score, seconds=best.seconds)


def _train_epochs(
    cfg: TrainConfig,
    run_dir: Path,
    folder: Path,
    fold: Fold,
    built: Assembled,
    watch: Watch | None,
    boards: Boards | None,
    best: BestEpoch,
    done: int,
    *,
    find_unused: bool,
) -> None:
    """Train a fold whose first `done` epochs are in its last checkpoint."""
    task = built.module.task
    callbacks: list[L.Callback] = [EpochLog(cfg), best]
    if best.monitor is not None and cfg.trainer.patience is not None:
        callbacks.append(EarlyStopping(best.monitor, mode=task.mode, patience=cfg.trainer.patience, min_delta=0.0))
    if fold.val is not None:
        callbacks.append(
            EpochSamples(
                fold.val,
                folder / "samples.jsonl",
                cfg.seed,
                together=ranks.divided(cfg.trainer),
                compiled=cfg.trainer.compile,
            )
        )
    if watch is not None:
        callbacks.append(Watcher(watch, run_dir, fold.index))
    bar = cfg.trainer.progress and sys.stderr.isatty() and ranks.is_first()
    if bar:
        callbacks.append(RichProgressBar(leave=False, console_kwargs={"stderr": True}))
    extra = ["train/skipped"] if cfg.trainer.on_nan == "skip" else []
    metrics = MetricsCSV(run_dir / "metrics.csv", fold=fold.index, metrics=task.scalars(), extra=extra)
    trainer = make_trainer(
        cfg,
        folder,
        find_unused=find_unused,
        max_epochs=cfg.trainer.max_epochs,
        gradient_clip_val=cfg.trainer.clip_norm,
        limit_val_batches=None if fold.val is not None else 0,
        callbacks=callbacks,
        logger=[metrics, *(boards.steady(folder) if boards else [])],
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=bar,
        plugins=[AtomicFiles()],
    )
    micro = micro_batch_size(cfg, trainer.world_size)
    trainer.accumulate_grad_batches = cfg.data.batch_size // (micro * trainer.world_size)
    loader = FoldData(
        fold,
        batch_size=micro,
        eval_batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        balance=cfg.data.balance,
        capacity=task.capacity(built.backbone, cfg.data),
    )
    loader.start_epoch = done
    last = best.folder / checkpoint.LAST if done else None
    trainer.fit(built.module, datamodule=loader, ckpt_path=last, weights_only=True)


def measure(cfg: TrainConfig, built: Assembled, part: Part) -> tuple[dict[str, Any], dict[str, Any]]:
    """All metrics of a model on labelled samples, per_class_accuracy and such among them, and what Task.plot takes."""
    trainer = make_trainer(cfg, Path.cwd())
    loader = FoldData.evaluation_loader(part, batch_size=cfg.data.batch_size, num_workers=cfg.data.num_workers)
    [scalars] = trainer.test(built.module, dataloaders=loader, verbose=False)
    extras = built.module.extras
    # torchmetrics computes in float32, which holds 7 digits
    metrics: dict[str, Any] = {name: round(float(value), 7) for name, value in sorted(scalars.items())}
    return metrics | built.module.task.detail(extras), extras


class EpochLog(L.Callback):
    """One line per epoch: the losses, the monitored metric and the training throughput."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.begun = 0.0
        self.seen = 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun, self.seen = time.monotonic(), module.samples_seen  # type: ignore[assignment]

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        logged = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch}", f"loss {float(logged['train/loss']):.4f}"]
        for name in ("val/loss", f"val/{self.cfg.task.metric}"):
            if name in logged and f"{name} " not in "".join(parts):
                parts.append(f"{name} {float(logged[name]):.4f}")
        rate = (module.samples_seen - self.seen) / max(1e-9, time.monotonic() - self.begun)  # type: ignore[operator]
        log.info("%s, %.0f samples/s", ", ".join(parts), rate)


def cut_samples(file: Path, *, first_epoch: int) -> None:
    """Drop from a file of EpochSamples what will be written again, and a line that was not finished.

    Raises:
        UserError: another line is damaged.
    """
    if file.is_file():
        try:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < first_epoch]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}: not the samples that a run writes ({error}); move it away, then resume"
            ) from error
        write_text(file, "".join(kept))


class EpochSamples(L.Callback):
    """Lets the task show a few samples after every epoch, in a file with one JSON object a line.

    Args:
        together: all processes have to go through the model; still the first alone writes.
        compiled: the blocks of the model are, for training.
    """

    def __init__(self, part: Part, file: Path, seed: int, *, together: bool = False, compiled: bool = False) -> None:
        self.part, self.file, self.seed, self.together, self.compiled = part, file, seed, together, compiled

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero or self.together:
            tuning = cast(TuningModule, module)
            file = self.file if trainer.is_global_zero else Path(os.devnull)
            with computing(tuning.precision, tuning.device), compiled.eagerly(self.compiled):
                tuning.task.write_samples(tuning.backbone, self.part, file, epoch=trainer.current_epoch, seed=self.seed)


class Watcher(L.Callback):
    """Tells a watcher of every epoch."""

    def __init__(self, watch: Watch, run_dir: Path, fold: int) -> None:
        self.watch, self.run_dir, self.fold = watch, run_dir, fold

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.watch(Epoch(run_dir=self.run_dir, fold=self.fold, epoch=trainer.current_epoch, metrics=metrics))


def _results(
    cfg: TrainConfig, run_dir: Path, outcomes: list[Outcome], task: Task, class_names: list[str], started: float
) -> dict[str, Any]:
    """The content of results.json, and the pictures over all folds."""
    scored = outcomes[: cfg.cv.folds] if cfg.cv.folds > 1 else outcomes
    values = [outcome.row["value"] for outcome in scored if outcome.row["value"] is not None]
    mean = statistics.fmean(values) if values else None
    validation = [outcome.validation for outcome in scored if outcome.validation is not None]
    tests = [outcome.test for outcome in scored if outcome.test is not None]
    heldout = [outcome.heldout for outcome in scored if outcome.heldout is not None]
    extras = [outcome.extras for outcome in scored if outcome.extras]
    (run_dir / "plots").mkdir(exist_ok=True)
    plots.curves(run_dir / "metrics.csv", cfg.task.metric, run_dir / "plots" / "curves.png")
    if extras:
        task.plot(task.joined(extras), class_names, run_dir / "plots")
    seconds = sum(outcome.fit_s for outcome in outcomes)
    skipped = sum(outcome.skipped_steps for outcome in outcomes)
    return {
        "recipe": cfg.recipe,
        "status": "completed",
        "metric": cfg.task.metric,
        "value": mean,
        "mean": mean,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "folds": [outcome.row for outcome in scored],
        "validation": statistics.fmean(validation) if validation else None,
        "heldout": mean_metrics(heldout) if heldout else None,
        "test": mean_metrics(tests) if tests else None,
        "trainable_params": outcomes[0].counts["trainable"],
        "adapter_params": outcomes[0].counts["adapter"],
        "total_params": outcomes[0].counts["total"],
        "wall_s": round(time.monotonic() - started, 3),
        "samples_per_s": round(sum(outcome.samples_seen for outcome in outcomes) / seconds, 2),
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None,
        "seed": cfg.seed,
        **({"skipped_steps": skipped} if cfg.trainer.on_nan == "skip" else {}),
    }


def mean_metrics(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over models of every metric; element by element for those that are lists, None where all are."""
    means: dict[str, Any] = {}
    for name, value in tests[0].items():
        if isinstance(value, list):
            columns = zip(*(test[name] for test in tests), strict=True)
            kept = [[entry for entry in column if entry is not None] for column in columns]
            means[name] = [statistics.fmean(column) if column else None for column in kept]
        else:
            means[name] = statistics.fmean(test[name] for test in tests)
    return means
