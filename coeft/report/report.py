"""From runs to the content of a report: comparison, figures, and what each setting came to."""

import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coeft.config import NOTHING, Allowed, to_yaml
from coeft.errors import UserError
from coeft.report import figures
from coeft.report.coefficients import Learnt, by_layer, learnt
from coeft.report.figures import Figure
from coeft.report.read import Collection, Setting, collect, differing
from coeft.report.samples import Mixed, Opened, Shown, hardest, mixed, predictions
from coeft.report.statistics import reliability
from coeft.report.tables import Cell, Column, Compared, Table, against, choose_baseline, comparison, score
from coeft.stored import is_number

log = logging.getLogger("coeft")

DETAILED = 6  # settings with pictures of their own
CLASSES = 200  # rows of the table of classes
HARDEST = 12
SIDE_BY_SIDE = 8  # settings that fit beside each other in a table


@dataclass(kw_only=True)
class Detail:
    """One setting by itself."""

    setting: Setting
    key: str
    """Its name, fit for a file."""
    figures: list[Figure] = field(default_factory=list)
    hardest: list[Shown] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What is left out, and why."""
    mixed: Mixed | None = None
    models: list[Learnt] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a page shows."""

    collection: Collection
    compared: list[Compared]
    baseline: Setting
    comparison: Table
    overview: list[Figure]
    details: list[Detail]
    learnt: list[Figure]
    learnt_table: Table | None
    classes: Table | None
    groups: list[Table]
    """Of suites whose runs are in groups: what each run and each group came to, a row for each suite."""
    differing: Table | None
    configs: list[tuple[str, str]]
    """Name and config of every setting, as YAML."""

    @property
    def settings(self) -> list[Setting]:
        return self.collection.settings

    @property
    def figures(self) -> list[Figure]:
        """All of them, each with a key of its own."""
        return [*self.overview, *self.learnt, *(figure for detail in self.details for figure in detail.figures)]

    @property
    def best(self) -> Setting | None:
        """The setting with the best mean of the baseline's metric."""
        known = [s for s in self.settings if s.summary is not None and s.metric == self.baseline.metric]
        return ranked(known)[0] if known else None


def build(
    paths: Sequence[str | Path],
    *,
    baseline: str | None = None,
    samples: bool = True,
    heads: Sequence[tuple[int, int]] = (),
    allowed: Allowed = NOTHING,
) -> Report:
    """Read runs and make everything that their report holds.

    Args:
        paths: run directories, suites, sweeps, or folders of them.
        baseline: the setting that the others are compared with; None is the first.
        samples: also what needs the data and the models: reliability, hardest examples, attention maps.
        heads: (layer, head) whose attention maps are shown; empty for those that changed most.
        allowed: what the user has allowed the runs' configs.
    Raises:
        UserError: no complete run, or no setting called like the baseline.
    """
    collection = collect(paths, allowed=allowed)
    settings = collection.settings
    base = choose_baseline(settings, baseline)
    compared = against(settings, base)
    details = [_detail(setting, collection, key) for setting, key in _chosen(settings)]
    if samples:
        for detail in details:
            if not _secret(detail.setting, collection):
                _add_samples(detail, heads)
    for detail in details:
        detail.models = _learnt(detail)
    overview = [figures.scores(settings)] if any(len(s.scores) > 1 for s in settings) or len(settings) > 1 else []
    same = [setting for setting in settings if setting.metric == base.metric]
    cheap = figures.parameters(same)
    return Report(
        collection=collection,
        compared=compared,
        baseline=base,
        comparison=comparison(compared, base),
        overview=[*overview, *([cheap] if cheap else [])],
        details=details,
        learnt=_learnt_figures(details),
        learnt_table=_learnt_table(details),
        classes=_classes([detail.setting for detail in details if not _secret(detail.setting, collection)]),
        groups=_groups(collection.suites),
        differing=_differing(settings),
        configs=[(setting.name, to_yaml(setting.config)) for setting in settings],
    )


def comparison_table(paths: Sequence[str | Path], *, baseline: str | None = None, allowed: Allowed = NOTHING) -> Table:
    """The comparison alone, which needs neither figures nor models.

    Raises:
        UserError: as build.
    """
    settings = collect(paths, allowed=allowed).settings
    base = choose_baseline(settings, baseline)
    return comparison(against(settings, base), base)


def export_figures(paths: Sequence[str | Path], folder: str | Path, *, samples: bool = False) -> list[Path]:
    """Write every figure of a report on runs as PNG and SVG, for loggers and papers; returns the files.

    Args:
        samples: as of build.
    Raises:
        UserError: as build, or the folder cannot be written.
    """
    return save_figures(build(paths, samples=samples), Path(folder))


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write the figures of a report as KEY.png and KEY.svg, over older ones; returns the files.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for figure in report.figures for path in figure.save(folder)]
    except OSError as error:
        raise UserError(f"--figures: cannot write {folder} ({error.strerror})") from error


def ranked(settings: Sequence[Setting]) -> list[Setting]:
    """Better means first; those without a score last."""

    def place(setting: Setting) -> tuple[bool, float]:
        if setting.summary is None:
            return True, 0.0
        return False, -setting.summary.mean if setting.larger_is_better else setting.summary.mean

    return sorted(settings, key=place)


def _chosen(settings: Sequence[Setting]) -> list[tuple[Setting, str]]:
    """The settings that get pictures of their own, in the order of the comparison, with names fit for files."""
    best = [id(setting) for setting in ranked(settings)[:DETAILED]]
    keys: dict[str, Setting] = {}
    for setting in settings:
        if id(setting) in best:
            key = re.sub(r"[^\w.-]+", "-", setting.name).strip("-.") or "run"
            while key in keys:
                key += "-2"
            keys[key] = setting
    return [(setting, key) for key, setting in keys.items()]


def _secret(setting: Setting, collection: Collection) -> bool:
    """Whether held-out results must not be shown: those of a sweep's trials, but for its best one."""
    if not setting.records[0].trial:
        return False
    best = [
        (Path(folder) / str(results["best"]["run_dir"])).resolve()
        for folder, results in collection.sweeps.items()
        if results.get("best", {}).get("run_dir")
    ]
    return not any(
        record.run.path.resolve() == path or path in record.run.path.resolve().parents
        for record in setting.records
        for path in best
    )


def _detail(setting: Setting, collection: Collection, key: str) -> Detail:
    detail = Detail(setting=setting, key=key)
    drawn = figures.curves(setting, key)
    if drawn is not None:
        detail.figures.append(drawn)
    else:
        detail.missing.append("No learning curves: metrics.csv is missing.")
    if _secret(setting, collection):
        detail.missing.append("A trial of a sweep: its held-out results are not shown, so that nobody chooses by them.")
        return detail
    counts = confusion(setting)
    if counts is not None:
        detail.figures.append(figures.confusion(counts, class_names(setting), key))
    return detail


def confusion(setting: Setting) -> np.ndarray | None:
    """Counts (true class, predicted class) over all folds and seeds; None if the runs have none."""
    found = [fold.get("extras", {}).get("confusion") for record in setting.records for fold in record.folds]
    known = [np.asarray(counts) for counts in found if counts is not None]
    if not known or len({counts.shape for counts in known}) > 1 or known[0].shape[0] != len(class_names(setting)):
        return None
    return np.sum(known, axis=0)


def class_names(setting: Setting) -> list[str]:
    """The classes in the order of the outputs; empty if the adapter is gone."""
    from coeft.adapter_io import read_class_names

    run = setting.records[0].run
    try:
        return read_class_names(run.adapter(run.folds[0] if run.folds else None))
    except UserError:
        return []


def _add_samples(detail: Detail, heads: Sequence[tuple[int, int]]) -> None:
    """What needs the data and the models of a setting; a note where they are not there any more."""
    opened = [Opened(record) for record in detail.setting.records]
    if getattr(detail.setting.config.task, "target", None) == "class":
        try:
            found = [predictions(each) for each in opened]
            bins, error = reliability(
                [row.confidence for rows in found for row in rows], [row.right for rows in found for row in rows]
            )
            detail.figures.append(figures.reliability(bins, error, detail.key))
        except (UserError, OSError) as error_:
            detail.missing.append(f"No reliability diagram and no hardest examples: {_line(error_)}.")
        else:
            try:
                detail.hardest = hardest(opened[0], found[0], HARDEST)
            except (UserError, OSError) as error_:
                detail.missing.append(f"No hardest examples: {_line(error_)}.")
    if not any(getattr(method, "kind", None) == "coeff" for method in detail.setting.config.peft.values()):
        return
    try:
        detail.mixed = mixed(opened[0], heads)
    except (UserError, OSError) as error_:
        if str(error_).startswith("--heads"):
            raise
        detail.missing.append(f"No attention maps: {_line(error_)}.")
        return
    if detail.mixed.maps:
        which = "chosen heads" if heads else "the heads whose maps changed most"
        caption = (
            f"{detail.mixed.name}: {which}, attention of {detail.mixed.of} to the patches. Red: positive; "
            "blue: negative, which softmax attention cannot be."
        )
        detail.figures.append(figures.attention(detail.mixed.image, detail.mixed.maps, detail.key, caption))
    else:
        detail.missing.append("No attention maps: the tokens of this model are not one grid of image patches.")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _learnt(detail: Detail) -> list[Learnt]:
    try:
        return learnt(detail.setting)
    except UserError as error:
        detail.missing.append(f"Nothing on what coeff learnt: {_line(error)}.")
        return []


def _learnt_figures(details: Sequence[Detail]) -> list[Figure]:
    """Heat maps of each setting's first model on one scale, then the measures layer by layer."""
    with_coeff = [detail for detail in details if detail.models]
    if not with_coeff:
        return []
    largest = max(float(np.abs(a).max()) for d in with_coeff for a in d.models[0].alphas.values()) or 1.0
    drawn = []
    for detail in with_coeff:
        first = detail.models[0]
        several = f" The model of {first.name}." if len(detail.models) > 1 else ""
        one = " One scale for all settings." if len(with_coeff) > 1 else ""
        caption = f"{detail.setting.name}: α in each layer.{several}{one}"
        drawn.append(figures.coefficients(first.alphas, largest, detail.key, caption))
    measures: dict[str, dict[str, list[list[float]]]] = {}
    for detail in with_coeff:
        for measure, values in by_layer(detail.models).items():
            measures.setdefault(measure, {})[detail.setting.name] = values
    return [*drawn, figures.layers(measures)]


def _learnt_table(details: Sequence[Detail]) -> Table | None:
    with_coeff = [detail for detail in details if detail.models]
    if not with_coeff:
        return None
    measures = list(by_layer(with_coeff[0].models))
    negative = any(detail.mixed is not None for detail in with_coeff)
    keys = ("moved", "negative_weight", "hull_distance")
    columns = [
        Column(key="setting", title="setting"),
        Column(key="layer", title="layer"),
        *(Column(key=key, title=title, numeric=True) for key, title in zip(keys, measures, strict=True)),
        Column(key="negative_mass", title="negative mass of the new maps", numeric=True, shown=negative),
    ]
    rows = []
    for detail in with_coeff:
        values = by_layer(detail.models)
        for place, layer in enumerate(detail.models[0].alphas):
            cells = [score(statistics.fmean(values[measure][place]), 3) for measure in measures]
            mass = detail.mixed.negative.get(layer) if detail.mixed else None
            rows.append([Cell.of(detail.setting.name), Cell.of(layer), *cells, score(mass, 3)])
    return Table(
        key="learnt",
        title="What Coeff-Tuning learnt, by layer",
        columns=columns,
        rows=rows,
        notes=[
            "Means over the fold models. Distance moved: Frobenius norm of α. Negative weight: its share of the sum of "
            "|entries| of I + α. Distance from the convex hull: mean over heads of the Euclidean distance of a row of "
            "I + α to the nearest convex combination.",
            *(
                ["Negative mass: the share of the new attention maps' mass that is negative, on a few scored images."]
                if negative
                else []
            ),
        ],
    )


def _classes(settings: Sequence[Setting]) -> Table | None:
    """Accuracy of each class, a column per setting; None if the settings have not the same classes."""
    found = [(setting, counts) for setting in settings if (counts := confusion(setting)) is not None]
    names = class_names(found[0][0]) if found else []
    found = [(setting, counts) for setting, counts in found if class_names(setting) == names]
    if not found:
        return None
    totals = found[0][1].sum(1)
    shares = [np.diag(counts) / np.maximum(counts.sum(1), 1) for _, counts in found]
    order: list[int] = list(range(len(names)))
    notes = []
    if len(names) > CLASSES:
        order = sorted(np.argsort(np.mean(shares, axis=0), kind="stable")[:CLASSES].tolist())
        notes = [f"The {CLASSES} classes with the lowest accuracy, of {len(names):,}."]
    return Table(
        key="classes",
        title="Accuracy of each class",
        columns=[
            Column(key="class", title="class"),
            Column(key="samples", title="samples", numeric=True),
            *(Column(key=setting.name, title=setting.name, numeric=True) for setting, _ in found),
        ],
        rows=[
            [
                Cell.of(names[place]),
                Cell(f"{totals[place]:,}", float(totals[place])),
                *(score(float(share[place]) if totals[place] else None, 3) for share in shares),
            ]
            for place in order
        ],
        notes=notes,
    )


def _groups(suites: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Runs, groups and their means side by side, a table for suites with the same groups.

    Args:
        suites: folder -> results.json.
    """
    alike: dict[str, dict[str, Mapping[str, Any]]] = {}
    for folder, results in suites.items():
        key = repr([(name, group["runs"]) for name, group in results["groups"].items()])
        alike.setdefault(key, {})[folder] = results
    return [_group_table(number, found) for number, found in enumerate(alike.values())]


def _group_table(number: int, suites: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(suites.values()))
    runs = [run for group in first["groups"].values() for run in group["runs"]]
    columns = [
        Column(key="suite", title="suite"),
        *(Column(key=run, title=run, numeric=True) for run in runs),
        *(Column(key=f"mean_{name}", title=f"mean of {name}", numeric=True) for name in first["groups"]),
        Column(key="mean_groups", title=f"mean of the {len(first['groups'])}", numeric=True),
        Column(key="mean_runs", title=f"of all {len(runs)}", numeric=True),
    ]
    rows = []
    for folder, results in suites.items():
        means = [*results["groups"].values(), results["over_groups"], results["over_runs"]]
        cells = [score(_mean_of(run, results["members"])) for run in runs]
        rows.append([Cell.of(Path(folder).name), *cells, *(_spread(mean) for mean in means)])
    metric = first["over_groups"].get("metric") or "score"
    notes = ["A mean over groups counts each group once, a mean over runs each run. Deviations are over the seeds."]
    return Table(key=f"groups_{number}", title=f"{metric} by group", columns=columns, rows=rows, notes=notes)


def _mean_of(run: str, members: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of a run of a suite, over its seeds."""
    found = [member.get("mean") for name, member in members.items() if re.sub(r"-seed_-?\d+$", "", name) == run]
    known = [value for value in found if is_number(value)]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def _spread(entry: Mapping[str, Any]) -> Cell:
    mean, std = entry["mean"], entry.get("std")
    if mean is None:
        return score(None)
    return Cell(score(mean).text + ("" if std is None else f" ± {score(std).text}"), mean)


def _differing(settings: Sequence[Setting]) -> Table | None:
    found = differing(settings)
    if not found:
        return None
    if len(settings) <= SIDE_BY_SIDE:
        columns = [Column(key="key", title="key"), *(Column(key=s.name, title=s.name) for s in settings)]
        rows = [[Cell.of(key), *map(_typed, row)] for key, row in found.items()]
    else:
        columns = [Column(key="setting", title="setting"), *(Column(key=key, title=key) for key in found)]
        rows = [
            [Cell.of(setting.name), *(_typed(row[place]) for row in found.values())]
            for place, setting in enumerate(settings)
        ]
    return Table(key="differing", title="Settings that differ", columns=columns, rows=rows)


def _typed(text: str) -> Cell:
    """A cell that sorts as a number where it is one."""
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text, None if text == "–" else text)


def sweep_lines(results: Mapping[str, Any]) -> list[str]:
    """What a sweep came to, in sentences."""
    counts = ", ".join(f"{count} {kind}" for kind, count in results.get("trials", {}).items() if count)
    lines = [f"Trials: {counts}."]
    best = results.get("best") or {}
    if best:
        chosen = ", ".join(f"{key} = {_value(value)}" for key, value in best.get("params", {}).items())
        lines.append(f"Best: trial {best['number']}, {chosen}.")
    if results.get("heldout") is not None:
        lines.append(f"On data that chose nothing: {results['metric']} {results['heldout']:.4f}.")
    if results.get("test") is not None and results["test"] != results.get("heldout"):
        lines.append(f"On the test split: {results['metric']} {results['test']:.4f}.")
    for objective, shares in results.get("importance", {}).items():
        if shares:
            listed = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
            lines.append(f"Importance for {objective}: {listed}.")
    front = [str(trial["number"]) for trial in results.get("pareto", [])]
    if front:
        lines.append(f"Pareto front: trials {', '.join(front)}.")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
