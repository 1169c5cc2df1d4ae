"""What a sweep searches and how, as conf/sweep/*.yaml says it. Imports neither torch nor Optuna."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, get_args

from coeft.config import (
    FOLDERS,
    NOTHING,
    TrainConfig,
    annotations,
    apply_overrides,
    methods_by_name,
    refused_in_file,
    settings_from,
)
from coeft.errors import UserError, near

SAMPLERS = ("grid", "nsga2", "random", "tpe")
PRUNERS = ("hyperband", "median", "none")
LAUNCHERS = ("local", "ray")
# objective -> whether more or less of it is better; "validation" follows task.metric
OBJECTIVES = {
    "validation": None,
    "trainable_params": "min",
    "adapter_params": "min",
    "latency_ms": "min",
    "wall_s": "min",
    "samples_per_s": "max",
}
# not ray://, which is for programs outside of the cluster, who do not see its files
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]{1,5}")
# values of the space -> the config of a trial, and its runs by name if it has several (empty: it is one run)
Compose = Callable[[Mapping[str, Any]], tuple[TrainConfig, Mapping[str, TrainConfig]]]

# settings that trials of one sweep must share, or that name the run
_FIXED = {
    "recipe": "choose one by recipe=NAME",
    "suite": "a suite is not one run",
    "suite_groups": "a suite is not one run",
    "seeds": "several seeds a trial by sweep.seeds=[0,1,2]",
    "run_dir": "the trials stand in RUN/trials/",
    "dry_run": "type it",
    "allow_custom_targets": "type it",
    "backbone.trust_remote_code": "type it",
    "logger": "loggers do not change a run",
    "task.metric": "trials with different metrics cannot be compared",
    "trainer.progress": "it does not change a run",
    "trainer.devices": "each trial trains on one device",
    "trainer.strategy": "each trial trains on one device",
}


@dataclass(frozen=True)
class Choice:
    """Values of which a trial takes one."""

    values: tuple[Any, ...]

    def points(self) -> list[Any]:
        """Every value, for a grid."""
        return list(self.values)

    def ends(self) -> list[Any]:
        """The values that a check needs."""
        return list(self.values)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False
    """Whole numbers alone."""

    def points(self) -> list[Any] | None:
        """Every value, or None if there is no end of them."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + number * step for number in range(count)]
        return [int(value) for value in values] if self.whole else [float(f"{value:.12g}") for value in values]

    def ends(self) -> list[Any]:
        """The values that a check of the range needs."""
        return [self.low, self.high]


Entry = Choice | Range


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings of a search."""

    space: dict[str, Any] = field(default_factory=dict)
    """Key of the config -> [values], or {low, high} with log: true or step. Settings of a method that a trial's
    stack lacks do not apply to it."""
    objectives: list[str] = field(default_factory=lambda: ["validation"])
    """What is made better: validation (task.metric on validation data), trainable_params, adapter_params, latency_ms,
    wall_s, samples_per_s. Several give a Pareto front."""
    sampler: str = "tpe"
    """grid (every combination once), random, tpe or nsga2."""
    pruner: str = "none"
    """none, median or hyperband: ends a trial early whose validation is worse than that of others so far."""
    n_trials: int | None = None
    """Trials of the whole study, also those before a resume; null is 20, or every point of a grid."""
    time_limit: float | None = None
    """Seconds after which no further trial begins."""
    seeds: list[int] = field(default_factory=list)
    """Every trial is trained with each of these seeds, its values are the means. Empty is the config's seed alone."""
    launcher: str = "local"
    """local (this machine) or ray (a cluster of machines that share the run directory)."""
    n_jobs: int = 1
    """Trials at the same time, each in a process of its own; 1 stays in this one, unless launcher is ray."""
    address: str | None = None
    """Of the Ray cluster: HOST:PORT, or auto for the one of this machine; null starts one for the sweep."""
    gpus: float | None = None
    """GPUs of each trial on Ray, also parts of one; null is 1 if the cluster has any."""
    population: int | None = None
    """Size of a generation of nsga2; null is a fifth of n_trials, from 4 to 50."""
    storage: str | None = None
    """Address of a database of Optuna's, such as postgresql://host/name, that several machines share; null is a file
    in the run directory."""
    study: str | None = None
    """Name of the study in the storage; null is RECIPE-SWEEP."""

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("sampler", self.sampler, SAMPLERS),
            ("pruner", self.pruner, PRUNERS),
            ("launcher", self.launcher, LAUNCHERS),
        ):
            if value not in valid:
                raise UserError(f"sweep.{name}: no {name} {value!r}; {near(value, valid)}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise UserError(f"sweep.objectives: no objective {name!r}; {near(name, OBJECTIVES)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"sweep.objectives must name one objective or more, each once, not {self.objectives}")
        if len(self.objectives) > 1 and self.pruner != "none":
            raise UserError(f"sweep.pruner={self.pruner} needs a single objective; set sweep.pruner=none")
        if self.objectives != ["validation"] and self.pruner != "none":
            raise UserError(f"sweep.pruner={self.pruner} compares validation scores; set sweep.pruner=none")
        for name, number in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
            if number is not None and number < 1:
                raise UserError(f"sweep.{name} must be 1 or more, not {number}")
        if self.gpus is not None and not (self.gpus >= 0 and (self.gpus < 1 or float(self.gpus).is_integer())):
            raise UserError(f"sweep.gpus must be a whole number or a part of one GPU, such as 0.5, not {self.gpus}")
        if self.launcher != "ray":
            for name, given in (("address", self.address), ("gpus", self.gpus)):
                if given is not None:
                    raise UserError(f"sweep.{name} belongs to sweep.launcher=ray; leave it out, or set that")
        if self.address is not None and self.address != "auto" and not _ADDRESS.fullmatch(self.address):
            raise UserError(
                f"sweep.address must be HOST:PORT or auto, not {self.address!r}; null starts a cluster for the sweep"
            )
        if self.population is not None and self.population < 2:
            raise UserError(f"sweep.population must be 2 or more, not {self.population}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UserError(f"sweep.time_limit must be a positive number of seconds, not {self.time_limit}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"sweep.seeds: {self.seeds} repeats a seed")
        if self.storage is not None and "://" not in self.storage:
            raise UserError(
                f"sweep.storage must be an address such as sqlite:///FILE or postgresql://HOST/NAME, "
                f"not {self.storage!r}; leave it out for a file in the run directory"
            )


def read_settings(tree: Mapping[str, Any], *, where: str, mistakes: list[str] | None = None) -> Sweep:
    """Checked settings from plain values.

    Args:
        where: where the values come from, as a prefix of messages: empty, or such as "mine.yaml: ".
        mistakes: what the caller found wrong already, shown with the rest.
    Raises:
        UserError: everything that is wrong, one line each.
    """
    wrong = [f"{where}{text}" for text in refused_in_file(tree, NOTHING)]
    return settings_from(Sweep, tree, "sweep", locate=lambda key: where, mistakes=[*(mistakes or []), *wrong])


def parse_space(space: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries of a search space, those that are null left out.

    Raises:
        UserError: everything that is wrong, one line each. Whether a key exists and its values are valid, composing
            shows.
    """
    entries: dict[str, Entry] = {}
    wrong = []
    for key, node in space.items():
        if node is None:
            continue
        try:
            entries[key] = _entry(key, node)
        except UserError as error:
            wrong.append(f"sweep.space: {key}: {error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return entries


def _entry(key: str, node: Any) -> Entry:
    for fixed, reason in _FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            raise UserError(f"cannot be searched: {reason}")
    head = key.split(".")[0]
    names = [spec.name for spec in fields(TrainConfig)]
    if head not in names:
        raise UserError(f"no key {head!r}; {near(head, names)}")
    parts = key.split(".")
    if head == "peft" and len(parts) > 1 and parts[1] not in methods_by_name():
        raise UserError(f"no method {parts[1]!r}; {near(parts[1], methods_by_name())}")
    if isinstance(node, list):
        if not node:
            raise UserError("a list of values must not be empty")
        if any(value in node[:number] for number, value in enumerate(node)):
            raise UserError(f"{node} repeats a value")
        if any(isinstance(value, float) and not math.isfinite(value) for value in node):
            raise UserError(f"{node}: values must be finite")
        return Choice(tuple(node))
    if not isinstance(node, Mapping):
        raise UserError(f"must be a list of values, or {{low: A, high: B}}, not {node!r}")
    known = ("low", "high", "log", "step")
    for name in node:
        if name not in known:
            raise UserError(f"no key {name!r}; {near(str(name), known)}")
    for name in ("low", "high"):
        if not _is_number(node.get(name)):
            raise UserError(f"{name} must be a number, not {node.get(name)!r}")
    low, high, log, step = node["low"], node["high"], node.get("log", False), node.get("step")
    if not isinstance(log, bool):
        raise UserError(f"log must be true or false, not {log!r}")
    if not low < high:
        raise UserError(f"low must be less than high, not {low!r} and {high!r}")
    if log and low <= 0:
        raise UserError(f"low must be positive with log: true, not {low!r}")
    if step is not None and (not _is_number(step) or step <= 0):
        raise UserError(f"step must be a positive number, not {step!r}")
    if log and step is not None:
        raise UserError("log and step exclude each other")
    types = {kind for hint in annotations(key) for kind in _numbers_in(hint)}
    whole = types == {int} or (not types and all(isinstance(value, int) for value in (low, high, step or 0)))
    if whole and not all(float(value).is_integer() for value in (low, high, step or 0)):
        raise UserError(f"takes whole numbers; low, high and step must be some, not {dict(node)}")
    if whole:
        return Range(low=int(low), high=int(high), log=log, step=None if step is None else int(step), whole=True)
    return Range(low=float(low), high=float(high), log=log, step=None if step is None else float(step))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers_in(hint: Any) -> set[type]:
    return {kind for kind in (hint, *get_args(hint)) if kind in (int, float)}


def stack_of(value: Any) -> list[str]:
    """The methods that a value of the key `peft` names."""
    if value in (None, "none"):
        return []
    return [str(name) for name in value] if isinstance(value, list | tuple) else [str(value)]


def stacks(entries: Mapping[str, Entry], base: list[str]) -> list[list[str]]:
    """The stacks that trials may have.

    Args:
        base: the stack of the config, which holds if `peft` is not searched.
    """
    found = entries.get("peft")
    return [stack_of(value) for value in found.points() or []] if found is not None else [base]


def applies(key: str, stack: list[str]) -> bool:
    """Whether a key of the space has a meaning for a stack: settings of a method only where the method is."""
    parts = key.split(".")
    return parts[0] != "peft" or len(parts) == 1 or parts[1] in stack


def ordered(entries: Mapping[str, Entry]) -> list[str]:
    """The keys in the order in which a trial chooses: options of groups first, because settings hang on them."""
    return sorted(entries, key=lambda key: (key not in FOLDERS, list(entries).index(key)))


def grid(entries: Mapping[str, Entry], base: list[str]) -> list[dict[str, Any]]:
    """Every combination once, settings of absent methods left out.

    Raises:
        UserError: a range that has no end of values.
    """
    wrong = [
        f"sweep.space: {key}: a grid needs a list of values, or a step"
        for key, entry in entries.items()
        if entry.points() is None
    ]
    if wrong:
        raise UserError("\n".join(wrong))
    return list(_grid(entries, base))


def _grid(entries: Mapping[str, Entry], base: list[str]) -> Iterator[dict[str, Any]]:
    peft = entries.get("peft")
    for value in (peft.points() or []) if peft is not None else [None]:
        stack = base if peft is None else stack_of(value)
        keys = [key for key in ordered(entries) if key != "peft" and applies(key, stack)]
        for point in itertools.product(*(entries[key].points() or [] for key in keys)):
            yield ({} if peft is None else {"peft": value}) | dict(zip(keys, point, strict=True))


def plan(base: TrainConfig, settings: Sweep, compose: Compose) -> dict[str, Entry]:
    """The entries of the space, after a check of every choice, of both ends of every range, and of the first trial.

    Args:
        base: the config that the trials vary.
    Raises:
        UserError: everything that is wrong, one line each.
    """
    entries = parse_space(settings.space)
    if not entries:
        raise UserError("sweep.space is empty: choose a sweep by sweep=NAME, or type sweep.space.optim.lr=[1e-3,1e-2]")
    wrong = _unfit(base, settings)
    if settings.sampler == "grid":
        grid(entries, list(base.peft))
    found = stacks(entries, list(base.peft))
    for key in entries:
        if not any(applies(key, stack) for stack in found):
            name = key.split(".")[1]
            wrong.append(
                f"sweep.space: {key}: no trial has {name} in its stack; "
                f"add it by peft=[{','.join([*found[0], name])}], or take the key out by sweep.space.{key}=null"
            )
    if wrong:
        raise UserError("\n".join(wrong))
    # composing is slow, so once for every option of a group; a setting of an option is checked against the result
    configs: dict[str, list[TrainConfig]] = {}
    for group in [key for key in entries if key in FOLDERS]:
        for value in entries[group].points() or []:
            try:
                config, _ = compose({group: value})
            except UserError as error:
                wrong += _inside(error)
            else:
                configs.setdefault(group, []).append(config)
    for key, entry in entries.items():
        if key in FOLDERS or wrong:
            continue
        head = key.split(".")[0]
        for config in configs.get(head, [base]):
            if not applies(key, list(config.peft)):
                continue
            for value in entry.ends():
                try:
                    apply_overrides(config, {key: value}, allowed=[head])
                except UserError as error:
                    wrong += _inside(error)
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    compose(first_values(entries, list(base.peft)))
    return entries


def first_values(entries: Mapping[str, Entry], base: list[str]) -> dict[str, Any]:
    """The first value of every key, of those that apply to the first stack."""
    stack = stacks(entries, base)[0]
    return {key: entries[key].ends()[0] for key in ordered(entries) if applies(key, stack)}


def _unfit(base: TrainConfig, settings: Sweep) -> list[str]:
    """What of a config a sweep cannot do."""
    wrong = []
    if settings.launcher == "ray" and find_spec("ray") is None:
        wrong.append("sweep.launcher=ray needs Ray: pip install 'coeft[ray]', or set sweep.launcher=local")
    if base.suite:
        wrong.append("a sweep searches over one run, but the recipe is a suite of several; choose a recipe without one")
    if base.trainer.devices != 1:
        wrong.append(
            f"trainer.devices is {base.trainer.devices}, but each trial of a sweep trains on one device; "
            "several trials at the same time by sweep.n_jobs"
        )
    splits = getattr(base.data, "splits", None)
    own_split = getattr(splits, "val", None) is not None or getattr(base.data, "n_val", None)
    if base.cv.val_fraction == 0 and not own_split and "validation" in settings.objectives:
        wrong.append("a sweep selects on validation data: set cv.val_fraction, data.n_val or data.splits.val")
    return wrong


def _inside(error: UserError) -> list[str]:
    return [f"sweep.space: {line}" for line in str(error).splitlines()]
