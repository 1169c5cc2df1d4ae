"""What runs wrote, checked when it is read again: whoever copies or edits these files may leave them in any state."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from coeft.config import MOST_THREADS
from coeft.errors import UserError

COUNTS = ("n_train", "n_val", "n_test")


def check_results(results: Any, where: str) -> dict[str, Any]:
    """The content of RUN/results.json, of a run or of a suite.

    Raises:
        UserError: it is neither, or does not say that the run completed.
    """
    if not isinstance(results, dict) or results.get("status") != "completed":
        raise UserError(f"{where} does not say that the run completed")
    if "members" in results:
        members = results["members"]
        if not isinstance(members, dict) or not all(isinstance(member, dict) for member in members.values()):
            raise UserError(f"{where}: 'members' must be a mapping from names to what the runs came to")
        _check_groups(results, where)
        return results
    folds = results.get("folds")
    if not isinstance(folds, list) or not folds:
        raise UserError(f"{where}: 'folds' must be a list with an entry for each fold")
    for row in folds:
        check_row(row, f"{where}: 'folds'")
    if not isinstance(results.get("metric"), str):
        raise UserError(f"{where}: 'metric' must be the name of a metric, not {results.get('metric')!r}")
    for key in ("trainable_params", "adapter_params", "total_params"):
        if not is_count(results.get(key, 0)):
            raise UserError(f"{where}: {key!r} must be a number of parameters, not {results[key]!r}")
    for key in ("value", "mean", "std", "validation", "wall_s", "samples_per_s", "peak_rss_mb", "peak_gpu_mb"):
        if results.get(key) is not None and not is_number(results[key]):
            raise UserError(f"{where}: {key!r} must be a number, or null, not {results[key]!r}")
    for key in ("test", "heldout"):
        _check_metrics(results.get(key), f"{where}: {key!r}")
    return results


def _check_groups(results: Mapping[str, Any], where: str) -> None:
    """The means of a suite over groups of its runs, if it has groups."""
    groups = results.get("groups")
    if groups is None:
        return
    means = ("over_groups", "over_runs")
    entries = [*groups.values(), *(results.get(key) for key in means)] if isinstance(groups, dict) else [None]
    for entry in entries:
        numbers = [entry.get(key) for key in ("mean", "std")] if isinstance(entry, dict) else ["?"]
        if not all(number is None or is_number(number) for number in numbers):
            raise UserError(f"{where}: 'groups', {' and '.join(map(repr, means))} must hold a mean and an std each")
    for name, entry in groups.items():
        runs = entry.get("runs")
        if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
            raise UserError(f"{where}: 'groups': {name!r} must name its 'runs'")


def check_row(row: Any, where: str) -> None:
    """An entry of `folds`."""
    if not isinstance(row, dict) or not is_count(row.get("fold")):
        raise UserError(f"{where} must hold entries with the number of a 'fold'")
    for key in COUNTS:
        if not is_count(row.get(key)):
            raise UserError(f"{where}: {key!r} of fold {row['fold']} must be a number of samples, not {row.get(key)!r}")
    if row.get("value") is not None and not is_number(row["value"]):
        raise UserError(f"{where}: 'value' of fold {row['fold']} must be a number, or null, not {row['value']!r}")


def check_fold(outcome: Any, where: str) -> dict[str, Any]:
    """The content of a fold.json.

    Raises:
        UserError: it is not what a fold wrote.
    """
    try:
        _check_outcome(outcome)
    except UserError as error:
        raise UserError(f"{where}: {error}; delete the file to train this fold again") from None
    return outcome


def _check_outcome(outcome: Any) -> None:
    if not isinstance(outcome, dict):
        raise UserError("must be a mapping")
    check_row(outcome.get("row"), "'row'")
    if "value" not in outcome["row"]:
        raise UserError("'row' must have a 'value', a number or null")
    counts = outcome.get("counts")
    names = ("trainable", "adapter", "total")
    if not isinstance(counts, dict) or not all(is_count(counts.get(name)) for name in names):
        raise UserError(f"'counts' must hold {', '.join(names)}")
    numbers = [outcome.get("samples_seen"), outcome.get("skipped_steps", 0)]
    if not is_number(outcome.get("fit_s")) or not all(map(is_count, numbers)):
        raise UserError("'fit_s', 'samples_seen' and 'skipped_steps' must be numbers")
    if outcome.get("validation") is not None and not is_number(outcome["validation"]):
        raise UserError("'validation' must be a number, or null")
    for key in ("test", "heldout"):
        _check_metrics(outcome.get(key), repr(key))
    if outcome.get("extras") is not None and not isinstance(outcome["extras"], dict):
        raise UserError("'extras' must be a mapping, or null")


def _check_metrics(metrics: Any, where: str) -> None:
    """Name -> number, or a list of numbers and nulls; None is allowed."""
    if metrics is None:
        return
    if not isinstance(metrics, dict):
        raise UserError(f"{where} must be a mapping from metrics to numbers, or null")
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        if not all(each is None or is_number(each) for each in values):
            raise UserError(f"{where}: {name!r} must be a number, or a list of numbers")


def check_environment(environment: Any, where: str) -> dict[str, Any]:
    """The content of RUN/environment.json.

    Raises:
        UserError: it is not what a run wrote.
    """
    if not isinstance(environment, dict):
        raise UserError(f"{where} must be a mapping")
    threads = environment.get("threads")
    if not is_count(threads) or not 1 <= threads <= MOST_THREADS:
        raise UserError(f"{where}: 'threads' must be a number from 1 to {MOST_THREADS}, not {threads!r}")
    for key in ("versions", "data"):
        known = environment.get(key, {})
        if not isinstance(known, Mapping) or not all(isinstance(value, str) for value in known.values()):
            raise UserError(f"{where}: {key!r} must be a mapping from names to texts")
    for key in ("cpu", "device", "platform", "data_fingerprint"):
        if environment.get(key) is not None and not isinstance(environment[key], str):
            raise UserError(f"{where}: {key!r} must be a text, not {environment[key]!r}")
    if "cpu" in environment and not (
        isinstance(environment["cpu"], str) and isinstance(environment.get("device"), str)
    ):
        raise UserError(f"{where}: 'cpu' and 'device' must be texts")
    if not isinstance(environment.get("resumed", []), list):
        raise UserError(f"{where}: 'resumed' must be a list")
    return environment


def read_environment(run_dir: Path) -> dict[str, Any]:
    """RUN/environment.json.

    Raises:
        UserError: it is missing or damaged.
    """
    from coeft.run import read_json

    path = run_dir / "environment.json"
    return check_environment(read_json(path), str(path))


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 0 that a file of a run may hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
