"""One trial is one job: an ordinary run, whose scores go to the study. Jobs run here, or in processes beside."""

import csv
import logging
import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch

from coeft import suite
from coeft import train as training
from coeft.assemble import restore
from coeft.config import TrainConfig
from coeft.errors import UserError
from coeft.run import Run, read_json, write_text
from coeft.sweep.settings import Sweep
from coeft.sweep.study import Address, pruner

log = logging.getLogger("coeft")


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


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a job."""

    state: str
    """complete, pruned or failed."""
    values: list[float] = field(default_factory=list)
    """One for each objective, the mean over the runs."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the table and results.json say of the trial."""
    error: str | None = None
    fault: bool = False
    """The error is not the user's."""


def run_job(job: Job) -> Done:
    """Train a trial, or continue it; errors are recorded, an interrupt goes through.

    Raises:
        KeyboardInterrupt: the user stopped; the trial can be continued.
    """
    try:
        with _quiet():
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
        training.resume(job.folder, watch=watch)
        return
    shutil.rmtree(job.folder, ignore_errors=True)  # what was killed before its config stood
    config = replace(job.config, run_dir=str(job.folder))
    if job.members:
        suite.run_suite(config, job.members, watch=watch)
    else:
        training.train(config, watch=watch)


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
            value: float | None = statistics.fmean(latency_ms(folder) for folder in job.runs.values())
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


def latency_ms(run_dir: Path, *, repeats: int = 20) -> float:
    """Milliseconds of one forward of a finished run's model on one image, the median of `repeats` on this machine."""
    run = Run.open(run_dir)
    built, _ = restore(run.config, run.adapter(run.folds[0] if run.folds else None))
    module = built.module.eval()
    if torch.cuda.is_available():
        module = module.cuda()
    image = torch.zeros(1, 3, *built.backbone.preprocessing.image_size, dtype=torch.uint8, device=module.device)
    seconds = []
    with torch.inference_mode():
        for number in range(repeats + 3):
            begun = time.perf_counter()
            module(image)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:  # the first ones warm up
                seconds.append(time.perf_counter() - begun)
    return round(1e3 * statistics.median(seconds), 4)


def _note(job: Job, text: str) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(job.folder / "error.txt", text.rstrip() + "\n")


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


class Launcher(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool:
        """Whether another job can begin now."""

    def submit(self, job: Job) -> None:
        """Begin a job."""

    def wait(self) -> tuple[Job, Done]:
        """The next job that is done; at least one must have been submitted."""

    def busy(self) -> int:
        """Number of jobs that were submitted and not returned by wait."""

    def close(self) -> None:
        """Stop what runs; its trials can be continued."""


class Inline:
    """One job at a time, in this process."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def has_room(self) -> bool:
        return not self.jobs

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def wait(self) -> tuple[Job, Done]:
        done = run_job(self.jobs[0])
        return self.jobs.pop(0), done

    def busy(self) -> int:
        return len(self.jobs)

    def close(self) -> None:
        self.jobs.clear()


class Processes:
    """Several jobs at a time, each in a process that lives on for the next job."""

    def __init__(self, count: int, run: Callable[[Any], Done] = run_job) -> None:
        self.count, self.run = count, run
        self.idle: list[_Worker] = []
        self.running: list[tuple[_Worker, Job]] = []

    def has_room(self) -> bool:
        return len(self.running) < self.count

    def submit(self, job: Job) -> None:
        worker = self.idle.pop() if self.idle else _Worker(self.run)
        worker.pipe.send(job)
        self.running.append((worker, job))

    def wait(self) -> tuple[Job, Done]:
        ready = wait([worker.pipe for worker, _ in self.running])
        worker, job = next(entry for entry in self.running if entry[0].pipe in ready)
        self.running.remove((worker, job))
        try:
            done = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            return job, Done(state="failed", error=f"its process {how}", fault=True)
        self.idle.append(worker)
        return job, done

    def busy(self) -> int:
        return len(self.running)

    def close(self) -> None:
        workers = [*self.idle, *(worker for worker, _ in self.running)]
        self.idle, self.running = [], []
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(30)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


class _Worker:
    def __init__(self, run: Callable[[Any], Done]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, run), daemon=False)
        self.process.start()
        theirs.close()


def _serve(pipe: Connection, run: Callable[[Any], Done]) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which ends this process in order
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)  # the parent was killed; whoever resumes the sweep continues the trial

    threading.Thread(target=follow, daemon=True).start()
    try:
        while True:
            pipe.send(run(pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        pass


def launcher(settings: Sweep) -> Launcher:
    """The launcher of a sweep's settings."""
    return Inline() if settings.n_jobs == 1 else Processes(settings.n_jobs)
