"""Many runs of one recipe: suites and seeds, each member an ordinary run in RUN/NAME/."""

import logging
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from coeft import train as training
from coeft.config import NOTHING, Allowed, TrainConfig, allowed_by, load_config
from coeft.errors import UserError
from coeft.faults import told
from coeft.interrupt import interruptible
from coeft.lock import hold
from coeft.loggers._findings import finish, publish
from coeft.ranks import alone
from coeft.run import new_run_dir, read_json, write_config, write_json
from coeft.stored import check_results
from coeft.tables import print_suite

log = logging.getLogger("coeft")

# what RUN/results.json repeats of each member's own
SUMMARY = (
    "metric", "value", "mean", "std", "trainable_params", "adapter_params", "total_params", "wall_s", "samples_per_s",
    "seed",
)  # fmt: skip


MEMBERS = ".members"  # folder of the members' configs, 000_NAME.yaml and so on, until each becomes a run


def run_suite(cfg: TrainConfig, members: Mapping[str, TrainConfig], *, watch: training.Watch | None = None) -> Path:
    """Run the members one after another; return the suite's directory.

    Args:
        cfg: the suite's own config, with its run_dir.
        members: name -> config, in order; each name becomes a folder of the suite.
        watch: called after every epoch of every member.
    """
    alone("a suite")
    with new_run_dir(cfg) as run_dir, interruptible(run_dir):
        shutil.rmtree(run_dir / MEMBERS, ignore_errors=True)  # of a suite that was killed before it had a config
        with told(cfg, run_dir, "suite"):
            (run_dir / MEMBERS).mkdir()
            for number, (name, member) in enumerate(members.items()):
                path = run_dir / MEMBERS / f"{number:03}_{name}.yaml"
                write_config(path, replace(member, run_dir=str(run_dir / name)))
            write_config(run_dir / "config.yaml", cfg)  # last: a suite with a config has all its members
        return _run_members(cfg, run_dir, watch, allowed_by(cfg, *members.values()))


def resume_suite(run_dir: Path, *, watch: training.Watch | None = None, allowed: Allowed = NOTHING) -> Path:
    """Continue a suite: complete members are skipped, a begun one is resumed.

    Args:
        allowed: what the user has allowed the configs of the suite.
    """
    alone("a suite")
    cfg = load_config(run_dir / "config.yaml", allowed=allowed)
    with hold(run_dir), interruptible(run_dir):
        if (run_dir / "results.json").exists():
            finish(cfg, run_dir)
            raise UserError(f"{run_dir} is complete; there is nothing to resume")
        return _run_members(cfg, run_dir, watch, allowed)


def over_seeds(members: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of a member without its seed -> mean of its values over the seeds, their standard deviation and number.

    The deviation is that of a sample, None of a single seed. A run repeated with seeds alone is called "run".
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, member in members.items():
        groups.setdefault(re.sub(r"-?seed_-?\d+$", "", name) or "run", []).append(member)
    found = {}
    for name, group in groups.items():
        values = [member["mean"] for member in group if member["mean"] is not None]
        found[name] = {
            "metric": group[0]["metric"],
            "mean": mean(values) if values else None,
            "std": stdev(values) if len(values) > 1 else None,
            "seeds": len(group),
        }
    return found


def over_groups(
    members: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]], seeds: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """Means of a suite's runs by group, the mean of these means, and the mean of all runs in groups.

    With several seeds each seed has a mean of its own; the mean and the sample standard deviation are those over the
    seeds. A mean over something without a value is None.

    Args:
        members: name -> what the run came to; with seeds, NAME-seed_SEED.
        groups: name -> names of runs, without their seeds.
    Returns:
        groups: name -> metric, mean, std and runs; over_groups: metric, mean, std and the number of groups; over_runs:
        the same with the number of runs.
    """
    endings = [f"-seed_{seed}" for seed in seeds] or [""]
    metrics = {members[name + ending]["metric"] for names in groups.values() for name in names for ending in endings}
    metric = metrics.pop() if len(metrics) == 1 else None
    found = {}
    table: list[list[float | None]] = []  # a row for each group, a column for each seed
    for group, names in groups.items():
        table.append([_mean([members[name + ending]["mean"] for name in names]) for ending in endings])
        found[group] = {"metric": metric, **_spread(table[-1]), "runs": list(names)}
    over = [_mean(column) for column in zip(*table, strict=True)]
    grouped = [name for names in groups.values() for name in names]
    each = [_mean([members[name + ending]["mean"] for name in grouped]) for ending in endings]
    return {
        "groups": found,
        "over_groups": {"metric": metric, **_spread(over), "groups": len(found)},
        "over_runs": {"metric": metric, **_spread(each), "runs": len(grouped)},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation over seeds; the deviation of a single one is None."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {"mean": mean(known) if whole else None, "std": stdev(known) if whole and len(known) > 1 else None}


def _run_members(cfg: TrainConfig, run_dir: Path, watch: training.Watch | None, allowed: Allowed) -> Path:
    started = time.monotonic()
    configs = {path.stem.split("_", 1)[1]: path for path in sorted((run_dir / MEMBERS).glob("*.yaml"))}
    if not configs:
        raise UserError(f"{run_dir / MEMBERS} holds no members' configs: copy the suite again, or start a new one")
    members: dict[str, Any] = {}
    for number, (name, path) in enumerate(configs.items(), 1):
        folder = run_dir / name
        log.info("%s (%d of %d)", name, number, len(configs))
        if not (folder / "config.yaml").is_file():
            training.train(replace(load_config(path, allowed=allowed), run_dir=str(folder)), watch=watch)
        elif not (folder / "results.json").is_file():
            training.resume(folder, watch=watch, allowed=allowed)
        else:
            finish(load_config(path, allowed=allowed), folder)
        results = check_results(read_json(folder / "results.json"), f"{folder}/results.json")
        members[name] = {key: results.get(key) for key in SUMMARY}
    results = {
        "recipe": cfg.recipe,
        "status": "completed",
        "members": members,
        **({"over_seeds": over_seeds(members)} if cfg.seeds else {}),
        **(over_groups(members, cfg.suite_groups, cfg.seeds) if cfg.suite_groups else {}),
        "wall_s": round(time.monotonic() - started, 3),
    }
    with told(cfg, run_dir, "suite"):
        write_json(run_dir / "results.json", results)
    publish(cfg, run_dir)
    if watch is None:
        print_suite(read_json(run_dir / "results.json"), file=sys.stderr)
    return run_dir
