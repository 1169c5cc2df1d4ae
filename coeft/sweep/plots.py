"""Pictures of a study as PNG files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import optuna  # noqa: E402 (the backend is chosen first: there is no screen)
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from coeft.sweep.settings import Entry, Range  # noqa: E402

DPI = 120
BLUE, ORANGE, GREY = "#2f6fab", "#d9741a", "#9a9a9a"


def draw(
    study: optuna.Study,
    objectives: list[str],
    entries: Mapping[str, Entry],
    importance: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> None:
    """history.png, space.png, importance.png if it is known, and pareto.png for two objectives or more."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    history(study, objectives[0], folder / "history.png")
    space(trials, objectives[0], entries, folder / "space.png")
    if any(importance.values()):
        importances(importance, folder / "importance.png")
    if len(objectives) > 1:
        pareto(study, objectives, folder / "pareto.png")


def history(study: optuna.Study, objective: str, path: Path) -> None:
    """The first objective by trial, the best so far as a line; pruned trials by their last score, hollow."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    up = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    best: list[float] = []
    for trial in done:
        value = trial.values[0]
        best.append(value if not best else (max if up else min)(best[-1], value))
    numbers = [trial.number for trial in done]
    axis.plot(numbers, [trial.values[0] for trial in done], "o", color=BLUE, markersize=4, label="complete")
    axis.step(numbers, best, where="post", color=ORANGE, linewidth=1.2, label="best so far")
    pruned = [t for t in study.get_trials(deepcopy=False, states=[TrialState.PRUNED]) if t.intermediate_values]
    if pruned:
        last = [trial.intermediate_values[max(trial.intermediate_values)] for trial in pruned]
        axis.plot(
            [trial.number for trial in pruned], last, "o", mec=GREY, mfc="none", markersize=4, label="pruned",
        )  # fmt: skip
    axis.set(xlabel="trial", ylabel=_words(objective))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    _save(figure, path)


def space(trials: list[optuna.trial.FrozenTrial], objective: str, entries: Mapping[str, Entry], path: Path) -> None:
    """The first objective by each searched key, complete trials alone."""
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 0.6, 2.7 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for axis in axes.flat[len(entries) :]:
        axis.set_axis_off()
    for axis, (key, entry) in zip(axes.flat, entries.items(), strict=False):
        points = [(trial.params[key], trial.values[0]) for trial in trials if key in trial.params]
        if isinstance(entry, Range):
            if entry.log:
                axis.set_xscale("log")
            axis.plot([x for x, _ in points], [y for _, y in points], "o", color=BLUE, markersize=4, alpha=0.8)
        else:
            names = [_name(value) for value in entry.values]
            places = [names.index(_name(x)) for x, _ in points]
            axis.plot(places, [y for _, y in points], "o", color=BLUE, markersize=4, alpha=0.8)
            axis.set_xticks(range(len(names)), names, fontsize="small", rotation=20 if max(map(len, names)) > 6 else 0)
            axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_xlabel(key, fontsize="small")
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel(_words(objective), fontsize="small")
    _save(figure, path)


def importances(importance: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Share of each objective's variance that each key explains, by fANOVA."""
    known = {objective: shares for objective, shares in importance.items() if shares}
    longest = max(map(len, known.values()))
    figure, axes = plt.subplots(
        1, len(known), figsize=(4.8 * len(known), 1 + 0.34 * longest), layout="constrained", squeeze=False
    )
    for axis, (objective, shares) in zip(axes[0], known.items(), strict=True):
        keys = sorted(shares, key=lambda key: shares[key])
        axis.barh(keys, [shares[key] for key in keys], color=BLUE)
        axis.set(xlabel="share of the variance (fANOVA)", title=_words(objective), xlim=(0, 1))
        axis.grid(alpha=0.25, axis="x")
    _save(figure, path)


def pareto(study: optuna.Study, objectives: list[str], path: Path) -> None:
    """Every further objective against the first; the Pareto front in colour, numbered by trial."""
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    front = {trial.number for trial in study.best_trials}
    others = range(1, len(objectives))
    figure, axes = plt.subplots(
        1, len(others), figsize=(5.4 * len(others), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, number in zip(axes[0], others, strict=True):
        rest = [trial for trial in done if trial.number not in front]
        best = sorted((trial for trial in done if trial.number in front), key=lambda trial: trial.values[number])
        axis.plot([t.values[number] for t in rest], [t.values[0] for t in rest], "o", color=GREY, label="dominated")
        line = "-" if len(objectives) == 2 else ""
        axis.plot(
            [t.values[number] for t in best],
            [t.values[0] for t in best],
            f"o{line}",
            color=ORANGE,
            label="Pareto front",
        )
        for trial in best:
            axis.annotate(
                str(trial.number), (trial.values[number], trial.values[0]), xytext=(4, 4), textcoords="offset points",
                fontsize="small",
            )  # fmt: skip
        axis.set_xlabel(_words(objectives[number]))
        if min(trial.values[number] for trial in done) > 0 and objectives[number].endswith("_params"):
            axis.set_xscale("log")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(_words(objectives[0]))
    axes[0][-1].legend(fontsize="small")
    _save(figure, path)


def _name(value: Any) -> str:
    if isinstance(value, str) and value.startswith("["):  # a list, as Optuna stores it
        return value.strip("[]").replace('"', "").replace(", ", "+") or "none"
    return ("+".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


def _words(objective: str) -> str:
    return objective.replace("_", " ")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
