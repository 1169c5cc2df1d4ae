"""Finding finished runs in folders, and putting those together that differ in their seed alone."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from coeft.config import NOTHING, Allowed, TrainConfig, to_dict
from coeft.errors import UserError
from coeft.report.folders import Found, find
from coeft.report.statistics import Comparison, Summary, compare, summarize
from coeft.run import Run, read_json
from coeft.stored import check_fold, check_results, read_environment
from coeft.tasks._direction import smaller_is_better


@dataclass(frozen=True, kw_only=True)
class Record:
    """A complete run with one seed, and what its folds wrote."""

    run: Run
    name: str
    """Its folder, counted from the folder that all runs of the report share."""
    fingerprint: str | None
    """Of its data; None if environment.json is gone."""
    folds: tuple[dict[str, Any], ...]
    """fold.json of every scored fold, in order; empty if they are gone."""
    trial: bool = False
    """Part of a sweep: scored on validation data, since choosing by the held-out data would make it worthless."""

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @cached_property
    def scores(self) -> dict[tuple[int, int], float]:
        """(seed, fold) -> score."""
        if self.trial:
            found = {index: fold.get("validation") for index, fold in enumerate(self.folds)}
        else:
            found = {row["fold"]: row["value"] for row in self.run.results["folds"]}
        return {(self.config.seed, index): value for index, value in found.items() if value is not None}

    @property
    def scored_on(self) -> str:
        """held-out folds, test split or validation."""
        rows = self.run.results["folds"]
        if self.trial or not any(row["n_test"] for row in rows):
            return "validation"
        return "held-out folds" if self.config.cv.folds > 1 else "test split"

    @property
    def division(self) -> tuple[Any, ...] | None:
        """Equal for two runs whose folds hold the same samples; None if that cannot be told."""
        cv = self.config.cv
        if self.fingerprint is None:
            return None
        return self.fingerprint, max(1, cv.folds), cv.stratified, cv.group, self.config.seed, self.scored_on

    @property
    def ratio(self) -> float:
        """Held-out samples for each one that the fold's model has learnt or picked its epoch from; 0 without folds."""
        if self.config.cv.folds < 2 or self.trial:
            return 0.0
        shares = [row["n_test"] / (row["n_train"] + row["n_val"]) for row in self.run.results["folds"]]
        return sum(shares) / len(shares)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in their seed alone: one row of the comparison."""

    name: str
    records: tuple[Record, ...]

    @property
    def config(self) -> TrainConfig:
        return self.records[0].config

    @property
    def metric(self) -> str:
        return self.records[0].run.results["metric"]

    @property
    def scored_on(self) -> str:
        return self.records[0].scored_on

    @property
    def larger_is_better(self) -> bool:
        return not smaller_is_better(self.metric)

    @property
    def stack(self) -> str:
        """Such as "coeff + lora"."""
        return " + ".join(self.config.peft) or "head only"

    @cached_property
    def scores(self) -> dict[tuple[int, int], float]:
        """(seed, fold) -> score, over all its runs."""
        return {key: value for record in self.records for key, value in record.scores.items()}

    @cached_property
    def summary(self) -> Summary | None:
        """Of its scores; None if there is none."""
        scores = list(self.scores.values())
        return summarize(scores, ratio=self.records[0].ratio) if scores else None

    def value(self, key: str) -> float | None:
        """The mean over its runs of a number in results.json, such as wall_s; None if none has it."""
        found = [record.run.results.get(key) for record in self.records]
        known = [value for value in found if isinstance(value, int | float)]
        return sum(known) / len(known) if known else None

    def against(self, baseline: "Setting") -> tuple[Comparison | None, str]:
        """The paired test against a baseline over the folds and seeds that both have; or why there is none."""
        if self.metric != baseline.metric:
            return None, f"another metric ({self.metric})"
        ours = {record.division: record for record in self.records if record.division is not None}
        theirs = {record.division: record for record in baseline.records if record.division is not None}
        shared = [(ours[key], theirs[key]) for key in ours if key in theirs]
        pairs = [
            (own.scores[key], other.scores[key])
            for own, other in shared
            for key in sorted(own.scores.keys() & other.scores.keys())
        ]
        if not pairs:
            return None, "other data, folds or seeds"
        own, other = zip(*pairs, strict=True)
        return compare(own, other, ratio=shared[0][0].ratio), "" if len(pairs) > 1 else "a single score"


@dataclass(frozen=True, kw_only=True)
class Incomplete:
    """A folder that looks like a run, but cannot be read as a complete one."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Everything that a report is about."""

    settings: list[Setting]
    incomplete: list[Incomplete]
    sweeps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder -> results.json of a complete sweep."""
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> results.json of a complete suite whose runs are in groups."""


def collect(paths: Sequence[str | Path], *, allowed: Allowed = NOTHING) -> Collection:
    """The runs in some folders, those that differ in their seed alone put together.

    Args:
        paths: run directories, suites, sweeps, or folders of them.
        allowed: what the user has allowed the runs' configs.
    Raises:
        UserError: a path is missing or holds no run, or no run is complete.
    """
    found: dict[Path, Found] = {}
    for text in paths:
        path = Path(text).expanduser()
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        here = list(find(path, inside_sweep=_inside_sweep(path)))
        if not here:
            raise UserError(f"{path}: there is no run in this folder")
        found |= {each.path.resolve(): each for each in here}
    records: list[Record] = []
    incomplete: list[Incomplete] = []
    sweeps: dict[str, dict[str, Any]] = {}
    suites: dict[str, dict[str, Any]] = {}
    for each in found.values():
        if each.kind == "sweep":
            if (each.path / "results.json").is_file():
                sweeps[str(each.path)] = read_json(each.path / "results.json")
            else:
                incomplete.append(Incomplete(path=each.path, reason="the sweep did not complete"))
        elif each.kind == "suite":
            if not (each.path / "results.json").is_file():
                incomplete.append(Incomplete(path=each.path, reason="the suite did not complete"))
            elif groups := _groups(each.path, incomplete):
                suites[str(each.path)] = groups
        else:
            try:
                records.append(read_record(each, allowed=allowed))
            except (UserError, KeyError, TypeError) as error:
                incomplete.append(Incomplete(path=each.path, reason=_reason(error, each.path)))
    if not records:
        listed = "\n".join(f"  {each.path}: {each.reason}" for each in incomplete)
        raise UserError(f"no complete run to report on:\n{listed}")
    return Collection(settings=group(named(records)), incomplete=incomplete, sweeps=sweeps, suites=suites)


def _groups(path: Path, incomplete: list[Incomplete]) -> dict[str, Any] | None:
    """What a suite came to, if its runs are in groups; None if not, or if it cannot be read."""
    try:
        results = check_results(read_json(path / "results.json"), "results.json")
    except UserError as error:
        incomplete.append(Incomplete(path=path, reason=_reason(error, path)))
        return None
    return results if results.get("groups") else None


def _inside_sweep(path: Path) -> bool:
    return any((parent / "sweep.yaml").is_file() for parent in path.resolve().parents)


def _reason(error: Exception, path: Path) -> str:
    if not isinstance(error, UserError):
        return f"results.json is not that of a run ({type(error).__name__}: {error})"
    first = str(error).splitlines()[0]
    return first.removeprefix(f"{path}: ").removeprefix(f"{path} ")


def read_record(found: Found, *, allowed: Allowed = NOTHING) -> Record:
    """A complete run with what its folds wrote.

    Raises:
        UserError: the run is not complete, or a file of it cannot be read.
        KeyError: results.json lacks what every run writes.
    """
    run = Run.open(found.path, allowed=allowed)
    results = run.results
    for key in ("metric", "folds", "trainable_params"):
        results[key]
    files = [run.path / f"fold_{fold}" / "fold.json" for fold in run.folds] or [run.path / "fold.json"]
    environment = run.path / "environment.json"
    return Record(
        run=run,
        name=run.path.name,
        fingerprint=read_environment(run.path).get("data_fingerprint") if environment.is_file() else None,
        folds=tuple(check_fold(read_json(file), str(file)) for file in files)
        if all(file.is_file() for file in files)
        else (),
        trial=found.trial,
    )


def named(records: Sequence[Record]) -> list[Record]:
    """The records, each called by its path from the folder that they share; a single one by its own folder."""
    paths = [record.run.path.resolve() for record in records]
    if len(paths) == 1:
        return [replace(records[0], name=paths[0].name)]
    shared = os.path.commonpath(paths)
    return [
        replace(record, name=Path(os.path.relpath(path, shared)).as_posix())
        for record, path in zip(records, paths, strict=True)
    ]


def group(records: Iterable[Record]) -> list[Setting]:
    """Runs whose configs differ in the seed alone, put together; the same seed twice is two settings."""
    groups: list[list[Record]] = []
    keys: list[tuple[Any, ...]] = []
    for record in records:
        data = None if _drawn(record.config) else record.fingerprint
        key = (_identity(record.config), data, record.scored_on, record.trial)
        for place, known in enumerate(keys):
            if known == key and record.config.seed not in [other.config.seed for other in groups[place]]:
                groups[place].append(record)
                break
        else:
            keys.append(key)
            groups.append([record])
    settings: list[Setting] = []
    for members in groups:
        name = members[0].name
        if len(members) > 1:
            name = re.sub(r"[-/_]?seed_?\d+$", "", name) or members[0].run.path.resolve().parent.name
        taken = [setting.name for setting in settings]
        numbered = [name, *(f"{name} ({count})" for count in range(2, len(groups) + 2))]
        settings.append(Setting(name=next(n for n in numbered if n not in taken), records=tuple(members)))
    return settings


def _drawn(config: TrainConfig) -> bool:
    """Whether the seed decides which samples are used, so that runs with other seeds have other data."""
    drawn = ("n_train", "n_val", "n_test", "fraction", "shots")
    return any(getattr(config.data, key, None) is not None for key in drawn)


def _identity(config: TrainConfig) -> str:
    """The settings without the seed, and without what does not decide numbers."""
    tree = to_dict(
        replace(config, seed=0, seeds=[], suite={}, suite_groups={}, run_dir=None, recipe=None, dry_run=False)
    )
    tree.pop("logger")
    tree["trainer"].pop("progress")
    return json.dumps(tree, sort_keys=True, default=str)


def differing(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Dotted keys of the configs whose values are not the same in all settings -> value in each, – where absent."""
    flat = [_flat(_plain(setting)) for setting in settings]
    keys = list(dict.fromkeys(key for tree in flat for key in tree))
    values = {key: [_text(tree[key]) if key in tree else "–" for tree in flat] for key in keys if key != "peft"}
    return {key: row for key, row in values.items() if len(set(row)) > 1 and not _implied(key)}


def _implied(key: str) -> bool:
    """Whether a key says no more than the stack does."""
    return key.startswith("peft.") and key.endswith(".kind")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain(setting: Setting) -> dict[str, Any]:
    tree = to_dict(replace(setting.config, run_dir=None, suite={}, suite_groups={}, seeds=[], seed=0))
    seeds = [record.config.seed for record in setting.records]
    return {"stack": setting.stack, **tree, "seed": seeds if len(seeds) > 1 else seeds[0]}


def _flat(tree: Any, inside: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{inside}{key}"
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
