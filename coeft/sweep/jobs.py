"""One trial is one job: an ordinary run, whose scores go to the study."""

import csv
import fcntl
import logging
import shutil
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch

from coeft import suite
from coeft import train as training
from coeft.assemble import restore, settle
from coeft.config import NOTHING, Allowed, TrainConfig, allowed_by, shorten_home
from coeft.errors import UserError
from coeft.run import Run, read_json, write_text
from coeft.sweep.launch import Done
from coeft.sweep.settings import Sweep
from coeft.sweep.study import Address, pruner

log = logging.getLogger("coeft")

PATIENCE_S = 600.0  # a node that has lost its cluster ends its processes within a minute or two


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a process needs to run a trial."""

    trial_id: int
    """Optuna's id of the trial in its storage."""
    number: int
    folder: Path
    config: TrainConfig
    members: Mapping[str, TrainConfig]
    """The runs of the trial by name, such as one for each seed; empty is one run."""
    settings: Sweep
    address: Address
    maximize: bool
    """Whether more of task.metric is better."""

    @property
    def runs(self) -> dict[str, Path]:
        """Name -> folder of the trial's runs."""
        return {name: self.folder / name for name in self.members} or {"": self.folder}

    @property
    def allowed(self) -> Allowed:
        """What the user has allowed the configs of the trial."""
        return allowed_by(self.config, *self.members.values())

    @property
    def cpus(self) -> int:
        """CPUs that the trial keeps busy."""
        return max(config.trainer.threads or 1 for config in (self.config, *self.members.values()))


def run_job(job: Job) -> Done:
    """Train a trial, or continue it; errors are recorded, an interrupt goes through.

    Raises:
        KeyboardInterrupt: the user stopped; the trial can be continued.
    """
    try:
        with _quiet(), _alone(job):
            _train(job)
            return Done(state="complete", **_measured(job))
    except optuna.TrialPruned:
        return Done(state="pruned")
    except UserError as error:
        _note(job, str(error))
        return Done(state="failed", error=str(error))
    except Exception as error:
        _note(job, traceback.format_exc())
        return Done(state="failed", error=f"{type(error).__name__}: {error}", fault=True)


def _train(job: Job) -> None:
    if (job.folder / "results.json").is_file():  # killed after the run and before the study knew
        return
    watch = Reporter(job)
    if (job.folder / "config.yaml").is_file():
        training.resume(job.folder, watch=watch, allowed=job.allowed)
        return
    shutil.rmtree(job.folder, ignore_errors=True)  # what was killed before its config stood
    config = replace(job.config, run_dir=str(job.folder))
    if job.members:
        suite.run_suite(config, job.members, watch=watch)
    else:
        training.train(config, watch=watch)


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Hold a trial's folder: a process that its sweep has given up may live on for a while, on another machine even.

    Raises:
        UserError: the other process has not ended in time, or the file system has no locks.
    """
    path = job.folder.parent.parent / ".locks" / job.folder.name  # not inside: a begun folder may be thrown away
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + PATIENCE_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"another process has trained in {job.folder} for {PATIENCE_S:.0f} s; end it, then continue"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                raise UserError(f"run_dir: no file can be locked at {path} ({error.strerror})") from error
        yield


class Reporter:
    """Reports a trial's validation score after every epoch, and ends the trial if the pruner says so.

    The score at a moment is the mean, over the folds (and seeds) so far, of the best epoch so far. Trials are compared
    at equal moments, so it does not matter that later folds begin low.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.metric = f"val/{job.config.task.metric}"
        self.best: dict[tuple[str, int], float] = {}
        self.trial: optuna.trial.Trial | None = None
        if job.settings.objectives != ["validation"]:
            return  # Optuna takes scores of single objectives alone
        cfg = job.config
        epochs, folds = cfg.trainer.max_epochs, max(1, cfg.cv.folds)
        study = optuna.load_study(
            study_name=job.address.name,
            storage=job.address.open(),
            pruner=pruner(job.settings, epochs=epochs, steps=len(job.runs) * folds * epochs),
        )
        self.trial = optuna.trial.Trial(study, job.trial_id)
        self.reported = set(study._storage.get_trial(job.trial_id).intermediate_values)
        for name, folder in job.runs.items():  # of a trial that is continued
            for fold, value in _scores(folder / "metrics.csv", self.metric):
                self._keep((name, fold), value)

    def __call__(self, epoch: training.Epoch) -> None:
        cfg, folds = self.job.config, max(1, self.job.config.cv.folds)
        if self.trial is None or self.metric not in epoch.metrics or epoch.fold >= folds:  # the refit follows the folds
            return
        runs = self.job.runs
        name = next(name for name, folder in runs.items() if folder == epoch.run_dir)
        self._keep((name, epoch.fold), epoch.metrics[self.metric])
        step = (list(runs).index(name) * folds + epoch.fold) * cfg.trainer.max_epochs + epoch.epoch + 1
        if step not in self.reported:
            self.reported.add(step)
            self.trial.report(statistics.fmean(self.best.values()), step)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def _keep(self, key: tuple[str, int], value: float) -> None:
        better = max if self.job.maximize else min
        self.best[key] = better(self.best.get(key, value), value)


def _scores(path: Path, column: str) -> Iterator[tuple[int, float]]:
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get(column):
                    yield int(row["fold"]), float(row[column])


def _measured(job: Job) -> dict[str, Any]:
    """values and facts of a complete trial.

    Raises:
        UserError: the run had no validation data to be chosen by.
    """
    results = {name: read_json(folder / "results.json") for name, folder in job.runs.items()}

    def mean(key: str) -> float | None:
        found = [values[key] for values in results.values()]
        return None if any(value is None for value in found) else statistics.fmean(found)

    values = []
    for name in job.settings.objectives:
        if name == "latency_ms":
            value: float | None = statistics.fmean(
                latency_ms(folder, allowed=job.allowed) for folder in job.runs.values()
            )
        else:
            value = mean(name)
        if value is None:
            raise UserError("the run has no validation data: set cv.val_fraction, data.n_val or data.splits.val")
        values.append(value)
    first = next(iter(results.values()))
    unseen = all(row["n_test"] for row in first["folds"])  # else `value` repeats the validation score
    tests = [entry["test"] for entry in results.values()]
    metric = first["metric"]
    return {
        "values": values,
        "facts": {
            "validation": mean("validation"),
            "trainable_params": first["trainable_params"],
            "adapter_params": first["adapter_params"],
            "wall_s": round(sum(entry["wall_s"] for entry in results.values()), 3),
            "threads": read_json(next(iter(job.runs.values())) / "environment.json")["threads"],
            "heldout": mean("value") if unseen else None,
            "test": None if any(test is None for test in tests) else statistics.fmean(test[metric] for test in tests),
        },
    }


def latency_ms(run_dir: Path, *, repeats: int = 20, allowed: Allowed = NOTHING) -> float:
    """Milliseconds of one forward of a finished run's model on one sample, the median of `repeats` on this machine."""
    run = Run.open(run_dir, allowed=allowed)
    built, _ = restore(run.config, run.adapter(run.folds[0] if run.folds else None))
    module = settle(built).module.eval()
    if torch.cuda.is_available():
        module = module.cuda()
    sample = {name: value.to(module.device) for name, value in built.backbone.example().items()}
    seconds = []
    with torch.inference_mode():
        for number in range(repeats + 3):
            begun = time.perf_counter()
            module(sample)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:  # the first ones warm up
                seconds.append(time.perf_counter() - begun)
    return round(1e3 * statistics.median(seconds), 4)


def _note(job: Job, text: str) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(job.folder / "error.txt", shorten_home(text.rstrip()) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """A trial's messages go to its own log.txt; only warnings are shown."""
    levels = [(handler, handler.level) for handler in log.handlers]
    for handler, level in levels:
        handler.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
