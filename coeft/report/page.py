"""A report as one HTML page that needs nothing else: no network, no other file."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from coeft.config import shorten_home
from coeft.errors import UserError
from coeft.report.figures import SERIES
from coeft.report.read import Setting
from coeft.report.report import Detail, Report, sweep_lines
from coeft.report.tables import FORMATS
from coeft.run import read_json, versions, write_text

GENERATOR = "coeft report"
_HARDEST = "The {} wrong predictions that gave the true class the lowest probability"
# SERIES on a dark page, in the same order
DARK_SERIES = ("#6cb6ff", "#ffab5e", "#7ccf88", "#d5a6f2", "#5fd0da", "#ff9d92")


def write(report: Report, path: Path) -> None:
    """Write the page; an older report is replaced, any other file is left alone.

    Raises:
        UserError: another file is there, or it cannot be written.
    """
    check_target(path)
    try:
        write_text(path, render(report))
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror})") from error


def check_target(path: Path) -> None:
    """Refuse to write over what is no report.

    Raises:
        UserError: what is there, or that the folder is missing.
    """
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; give a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--out: there is no folder {path.parent}")
    if path.exists() and f'content="{GENERATOR}' not in _beginning(path):
        raise UserError(f"--out: {path} exists and is no report; choose another file")


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(2000)
    except OSError as error:
        raise UserError(f"--out: cannot read {path} ({error.strerror})") from error


def render(report: Report) -> str:
    """The page as text."""
    source = (files("coeft.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    several = len(report.settings) > 1
    best = report.best
    return environment.from_string(source).render(
        generator=f"{GENERATOR} {versions().get('coeft', '')}".strip(),
        title=title(report),
        lead=lead(report),
        series=list(zip(SERIES, DARK_SERIES, strict=True)),
        contents=_contents(report),
        several=several,
        comparison=report.comparison,
        best=best.name if best and several else None,
        copies={name: form(report.comparison) for name, form in FORMATS.items()},
        incomplete=[
            {"path": shorten_home(str(each.path)), "reason": shorten_home(each.reason)}
            for each in report.collection.incomplete
        ],
        overview=report.overview,
        sweeps=[
            {"name": shorten_home(folder), "lines": sweep_lines(results)}
            for folder, results in report.collection.sweeps.items()
        ],
        classes=report.classes,
        groups=report.groups,
        learnt={"figures": report.learnt, "table": report.learnt_table} if report.learnt else None,
        details=[_shown(detail) for detail in report.details],
        not_detailed=[s.name for s in report.settings if s not in [d.setting for d in report.details]],
        differing=report.differing,
        configs=_configs(report),
        footer=_footer(report),
    )


def title(report: Report) -> str:
    """Such as "quickstart: 5 settings"."""
    recipes = list(dict.fromkeys(s.config.recipe or s.config.data.kind for s in report.settings))
    about = recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes"
    if len(report.settings) == 1:
        return f"{about}: {report.settings[0].stack}"
    return f"{about}: {len(report.settings)} settings"


def lead(report: Report) -> list[str]:
    """The main result in one or two sentences."""
    settings = report.settings
    runs = sum(len(setting.records) for setting in settings)
    models = sum(max(1, len(record.run.folds)) for setting in settings for record in setting.records)
    backbones = list(dict.fromkeys(_name(setting.config.backbone) for setting in settings))
    data = list(dict.fromkeys(_name(setting.config.data) for setting in settings))
    lines = [
        f"{_listed(backbones)} on {_listed(data)}: {_count(runs, 'run')}, {_count(models, 'trained model')}.",
    ]
    best = report.best
    if best is not None and best.summary is not None:
        spread = f" ± {best.summary.sd:.4f}" if best.summary.sd is not None else ""
        trained = f"{best.value('trainable_params') or 0:,.0f}"
        reached = f"{best.metric.replace('_', ' ')} {best.summary.mean:.4f}{spread} on {_place(best)}"
        who = f"Best mean: {best.name} with " if len(settings) > 1 else "Reached: "
        lines.append(f"{who}{reached}, {trained} parameters trained.")
    return lines


def _place(setting: Setting) -> str:
    return {"held-out folds": "the held-out folds", "test split": "the test split"}.get(
        setting.scored_on, "validation data"
    )


def _name(settings: Any) -> str:
    name = getattr(settings, "name", None)
    return shorten_home(name) if isinstance(name, str) and name else str(getattr(settings, "kind", "own class"))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _contents(report: Report) -> list[tuple[str, str]]:
    several = len(report.settings) > 1
    found = [("comparison", "Comparison" if several else "Result")]
    if report.collection.sweeps:
        found.append(("sweeps", "Sweep"))
    if report.groups:
        found.append(("groups", "Groups"))
    if report.classes:
        found.append(("classes", "Classes"))
    if report.learnt:
        found.append(("coeff", "What Coeff-Tuning learnt"))
    return [*found, ("runs", "Each setting" if several else "The run"), ("settings", "Settings")]


def _shown(detail: Detail) -> Mapping[str, Any]:
    summary = detail.setting.summary
    score = "no score" if summary is None else f"{detail.setting.metric.replace('_', ' ')} {summary.mean:.4f}"
    wrong = len(detail.hardest)
    return {
        "name": detail.setting.name,
        "line": f"{detail.setting.stack}, {score}",
        "figures": detail.figures,
        "hardest": detail.hardest,
        "hardest_about": ("The only wrong prediction" if wrong == 1 else _HARDEST.format(wrong))
        + (f" of seed {detail.setting.config.seed}." if len(detail.setting.records) > 1 else "."),
        "missing": [shorten_home(line) for line in detail.missing],
    }


def _configs(report: Report) -> list[dict[str, str]]:
    lines = {s.name: ", ".join(shorten_home(str(record.run.path)) for record in s.records) for s in report.settings}
    return [{"name": name, "line": lines[name], "text": text} for name, text in report.configs]


def _footer(report: Report) -> str:
    path = report.settings[0].records[0].run.path / "environment.json"
    facts = read_json(path) if path.is_file() else {}
    torch, device = facts.get("versions", {}).get("torch"), facts.get("device")
    trained = f"; trained with torch {torch} on {device}" if torch and device else ""
    return f"Written by coeft {versions().get('coeft', '')}{trained}."
