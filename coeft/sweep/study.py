"""The study of a sweep: where Optuna keeps it, how it draws, when it prunes."""

import json
import sqlite3
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from coeft.errors import UserError
from coeft.seeding import derive
from coeft.sweep.settings import Choice, Entry, Range, Sweep, applies, ordered, stack_of

optuna.logging.set_verbosity(optuna.logging.ERROR)  # coeft reports every trial itself


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a study is, for this process and for others."""

    storage: str | None
    """An Optuna URL; None is the file."""
    file: Path
    name: str

    def open(self) -> optuna.storages.BaseStorage:
        """The storage.

        Raises:
            UserError: it cannot be reached.
        """
        try:
            if self.storage is not None:
                return optuna.storages.get_storage(self.storage)
            path = str(self.file)
            # a function that connects, because not every path can be written in an address
            engine = {"creator": lambda: sqlite3.connect(path, timeout=60, check_same_thread=False)}
            return optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs=engine)
        except Exception as error:  # every database has errors of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"sweep.storage: cannot open {self.storage or self.file}: {reason}") from error


def pruner(settings: Sweep, *, epochs: int, steps: int) -> optuna.pruners.BasePruner:
    """The pruner of a study whose trials report `steps` scores, `epochs` of them in each fold."""
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, epochs // 4))
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(2, steps), reduction_factor=3)
    return optuna.pruners.NopPruner()


def sampler(settings: Sweep, n_trials: int, seed: int, *names: str | int) -> optuna.samplers.BaseSampler:
    """The sampler for one trial; made anew for each, so that a resumed study draws what it would have drawn.

    Args:
        names: what tells the trials apart, such as how many there were before.
    """
    drawn = derive(seed, "sweep", *names)
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=max(4, min(10, n_trials // 4)))
    if settings.sampler == "nsga2":
        population = settings.population or max(4, min(50, n_trials // 5))
        return optuna.samplers.NSGAIISampler(seed=drawn, population_size=population)
    return optuna.samplers.RandomSampler(seed=drawn)  # the points of a grid are enqueued, nothing is drawn


def label(value: Any) -> Any:
    """A choice as Optuna can store it: itself, or JSON text of a list or mapping."""
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else value


def suggest(trial: optuna.trial.Trial, entries: Mapping[str, Entry], base: list[str]) -> dict[str, Any]:
    """The values of one trial; settings of methods outside its stack are not asked for.

    Args:
        base: the stack if `peft` is not searched.
    """
    return _values(entries, base, lambda key, entry: _suggest(trial, key, entry))


def values_of(trial: optuna.trial.FrozenTrial, entries: Mapping[str, Entry], base: list[str]) -> dict[str, Any]:
    """The values that a trial had."""
    return _values(entries, base, lambda key, entry: _plain(entry, trial.params[key]))


def _values(entries: Mapping[str, Entry], base: list[str], take: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    stack = base
    for key in ordered(entries):
        if key == "peft":
            values[key] = take(key, entries[key])
            stack = stack_of(values[key])
    for key in ordered(entries):
        if key != "peft" and applies(key, stack):
            values[key] = take(key, entries[key])
    return values


def _suggest(trial: optuna.trial.Trial, key: str, entry: Entry) -> Any:
    if isinstance(entry, Choice):
        return _plain(entry, trial.suggest_categorical(key, [label(value) for value in entry.values]))
    points = entry.points() if entry.step is not None else None
    high = points[-1] if points else entry.high  # Optuna warns of a range that is no multiple of the step
    if entry.whole:
        step = 1 if entry.step is None else int(entry.step)
        return trial.suggest_int(key, int(entry.low), int(high), step=step, log=entry.log)
    return _plain(entry, trial.suggest_float(key, entry.low, high, step=entry.step, log=entry.log))


def _plain(entry: Entry, stored: Any) -> Any:
    if isinstance(entry, Choice):
        same = [value for value in entry.values if label(value) == stored and type(label(value)) is type(stored)]
        return same[0]
    if isinstance(entry, Range) and entry.step is not None and not entry.whole:
        return float(f"{stored:.12g}")
    return stored


def _value(number: int, trial: optuna.trial.FrozenTrial) -> float:
    return trial.values[number]


def importances(study: optuna.Study, seed: int) -> dict[str, dict[str, float]]:
    """Objective number, as text -> key -> share of the variance that fANOVA finds in it; empty if too few trials."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    found: dict[str, dict[str, float]] = {}
    for number in range(len(study.directions)):
        evaluator = FanovaImportanceEvaluator(seed=derive(seed, "importance"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shares = get_param_importances(study, evaluator=evaluator, target=partial(_value, number))
        except (ValueError, RuntimeError):  # one trial, or all of the same value
            continue
        if shares and any(share > 0 for share in shares.values()):
            found[str(number)] = {key: round(float(share), 4) for key, share in shares.items()}
    return found
