"""Tables of results for people, on a terminal."""

from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table


def console(file: IO[str]) -> Console:
    """A console that does not wrap tables when the output is no terminal."""
    return Console(file=file, highlight=False, width=None if file.isatty() else 120)


def spread(mean: float | None, std: float | None) -> str:
    """Such as "0.9751 ± 0.0042"."""
    if mean is None:
        return "none"
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def print_folds(results: Mapping[str, Any], *, file: IO[str]) -> None:
    """One run: a row per fold, then mean ± sd, trainable parameters and time."""
    metric = results["metric"]
    several = len(results["folds"]) > 1
    held = "held out" if several else "test"
    measured_on = "the held-out fold" if several else "the test split"
    if not results["folds"][0]["n_test"]:
        measured_on = "validation"
    table = Table(title=f"{results['recipe'] or 'train'}: {metric} on {measured_on}")
    for name in ("fold", metric, "best epoch", "train", "val", held):
        table.add_column(name, justify="right")
    for row in results["folds"]:
        value = "none" if row["value"] is None else f"{row['value']:.4f}"
        table.add_row(*map(str, (row["fold"], value, row["best_epoch"], row["n_train"], row["n_val"], row["n_test"])))
    if several:
        table.add_section()
        table.add_row("mean ± sd", spread(results["mean"], results["std"]))
    out = console(file)
    out.print(table)
    if measured_on == "validation":
        out.print("there is no test split")
    out.print(
        f"trained {results['trainable_params']:,} of {results['total_params']:,} parameters "
        f"({results['adapter_params']:,} without the head) in {results['wall_s']:.0f} s, "
        f"{results['samples_per_s']:.0f} samples/s, peak memory {results['peak_rss_mb']:.0f} MiB"
    )
    if results["test"] and several:
        out.print(f"test split, mean over the fold models: {metric} {results['test'][metric]:.4f}")


def print_suite(results: Mapping[str, Any], *, file: IO[str]) -> None:
    """A suite: a row per run, side by side."""
    members = results["members"]
    metrics = sorted({member["metric"] for member in members.values()})
    table = Table(title=f"{results['recipe'] or 'suite'}: {', '.join(metrics)}")
    table.add_column("run")
    for name in ("mean ± sd", "trainable", "without head", "time"):
        table.add_column(name, justify="right")
    for name, member in members.items():
        table.add_row(
            name,
            spread(member["mean"], member["std"]),
            f"{member['trainable_params']:,}",
            f"{member['adapter_params']:,}",
            f"{member['wall_s']:.0f} s",
        )
    out = console(file)
    out.print(table)
    if repeated := results.get("over_seeds"):
        summary = Table(title="over the seeds")
        summary.add_column("run")
        for name in ("mean ± sd", "seeds"):
            summary.add_column(name, justify="right")
        for name, group in repeated.items():
            summary.add_row(name, spread(group["mean"], group["std"]), str(group["seeds"]))
        out.print(summary)
    if groups := results.get("groups"):
        over, each = results["over_groups"], results["over_runs"]
        table = Table(title=f"{results['recipe'] or 'suite'}: mean {over['metric']} by group")
        for name, group in groups.items():
            table.add_column(f"{name} ({len(group['runs'])})", justify="right")
        table.add_column(f"mean of the {over['groups']}", justify="right")
        table.add_column(f"of all {each['runs']}", justify="right")
        table.add_row(*(spread(column["mean"], column["std"]) for column in (*groups.values(), over, each)))
        out.print(table)


def print_trials(
    results: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]], *, recipe: str, file: IO[str]
) -> None:
    """A sweep: its best trials, what each key matters, and the score of the best one on data that chose nothing.

    Args:
        results: results.json of the sweep.
        ranked: the trials to show, better ones first.
        recipe: the argument that repeats the best trial, quoted.
    """
    trials, objectives = results["trials"], list(results["objectives"])
    front = {trial["number"] for trial in results["pareto"]}
    keys = list(dict.fromkeys(key for trial in ranked for key in trial["params"]))
    counts = ", ".join(f"{count} {state}" for state, count in trials.items() if count)
    table = Table(title=f"{results['recipe'] or 'train'}, sweep {results['sweep']}: {counts} trials")
    table.add_column("trial", justify="right")
    for name in objectives:
        table.add_column(f"{results['metric']} on validation" if name == "validation" else name, justify="right")
    for key in keys:
        table.add_column(key)
    for trial in ranked:
        mark = " *" if trial["number"] in front else ""
        values = [f"{value:,}" if isinstance(value, int) else f"{value:.6g}" for value in trial["values"].values()]
        cells = [_short(trial["params"][key]) if key in trial["params"] else "" for key in keys]
        table.add_row(f"{trial['number']}{mark}", *values, *cells)
    out = console(file)
    out.print(table)
    if front:
        numbers = ", ".join(str(trial["number"]) for trial in results["pareto"])
        out.print(f"* Pareto front, of all trials: {numbers}")
    for name, shares in results["importance"].items():
        if shares:
            of = f" of {name}" if len(objectives) > 1 else ""
            out.print(f"importance{of}: " + ", ".join(f"{key} {share:.2f}" for key, share in shares.items()))
    number, metric = results["best"]["number"], results["metric"]
    if results["heldout"] is not None:
        out.print(f"trial {number} on data that chose nothing: {metric} {results['heldout']:.4f}")
    if results["test"] is not None and results["test"] != results["heldout"]:
        out.print(f"trial {number} on the test split: {metric} {results['test']:.4f}")
    out.print(f"to run it: coeft train {recipe}", soft_wrap=True, markup=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
