"""Tables as plain data, and as Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from coeft.errors import UserError
from coeft.report.read import Setting
from coeft.report.statistics import Comparison, holm

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    key: str
    """Its name in CSV files."""
    title: str
    numeric: bool = False
    about: str = ""
    """What it holds, in a sentence."""
    shown: bool = True
    """For readers; the others stand in CSV files alone."""
    exported: bool = True
    """In CSV files."""


@dataclass(frozen=True)
class Cell:
    """What a table holds in one place."""

    text: str
    """For readers."""
    value: float | str | None = None
    """For sorting and CSV files; None is nothing."""

    @classmethod
    def of(cls, value: str) -> "Cell":
        """A cell of text."""
        return cls(value, value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under columns."""

    key: str
    """Such as comparison."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=list)

    def shown(self) -> tuple[list[Column], list[list[Cell]]]:
        """The columns and rows for readers."""
        places = [place for place, column in enumerate(self.columns) if column.shown]
        return [self.columns[place] for place in places], [[row[place] for place in places] for row in self.rows]


def score(value: float | None, digits: int = 4) -> Cell:
    """A metric."""
    return Cell(MISSING) if value is None else Cell(f"{value:.{digits}f}", value)


def signed(value: float | None, digits: int = 4) -> Cell:
    """A difference, with its sign."""
    return Cell(MISSING) if value is None else Cell(f"{value:+.{digits}f}".replace("-", "−"), value)


def whole(value: float | None) -> Cell:
    """A count, with thousands apart."""
    return Cell(MISSING) if value is None else Cell(f"{value:,.0f}", value)


def seconds(value: float | None) -> Cell:
    """A duration such as 42 s, 3 min 20 s or 2 h 5 min."""
    if value is None:
        return Cell(MISSING)
    total = round(value)
    if total < 100:
        text = f"{value:.1f} s" if value < 10 else f"{total} s"
    elif total < 6000:
        text = f"{total // 60} min {total % 60} s"
    else:
        text = f"{total // 3600} h {total % 3600 // 60} min"
    return Cell(text, value)


def p_value(value: float | None) -> Cell:
    """A probability with two significant digits, small ones as < 0.001."""
    if value is None:
        return Cell(MISSING)
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}", value)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A setting beside the baseline."""

    setting: Setting
    test: Comparison | None
    """None of the baseline itself, and where nothing can be paired."""
    adjusted: float | None
    """p, corrected for all tests of the report."""
    reason: str
    """Why there is no test; empty if there is one, and for the baseline."""


def choose_baseline(settings: Sequence[Setting], name: str | None) -> Setting:
    """The setting of that name, or the first one.

    Raises:
        UserError: there is no such name.
    """
    if name is None:
        return settings[0]
    for setting in settings:
        if setting.name == name:
            return setting
    raise UserError(f"--baseline: no setting {name!r}; there are {', '.join(setting.name for setting in settings)}")


def against(settings: Sequence[Setting], baseline: Setting) -> list[Compared]:
    """Every setting tested against the baseline; p-values corrected by Holm's method over all of them."""
    pairs = [(None, "") if setting is baseline else setting.against(baseline) for setting in settings]
    tested = [place for place, (test, _) in enumerate(pairs) if test is not None and test.p is not None]
    adjusted = dict(zip(tested, holm([pairs[place][0].p for place in tested]), strict=True))  # type: ignore[union-attr,misc]
    return [
        Compared(setting=setting, test=test, adjusted=adjusted.get(place), reason=reason)
        for place, (setting, (test, reason)) in enumerate(zip(settings, pairs, strict=True))
    ]


def comparison(rows: Sequence[Compared], baseline: Setting) -> Table:
    """The main table: a row per setting."""
    settings = [row.setting for row in rows]
    metrics = list(dict.fromkeys(setting.metric for setting in settings))
    places = list(dict.fromkeys(setting.scored_on for setting in settings))
    counts = {len(setting.scores) for setting in settings}
    one = metrics[0].replace("_", " ") if len(metrics) == 1 else "score"
    columns = [
        Column(key="setting", title="setting"),
        Column(key="recipe", title="recipe", shown=len({setting.config.recipe for setting in settings}) > 1),
        Column(key="stack", title="stack"),
        Column(key="metric", title="metric", shown=len(metrics) > 1),
        Column(key="scored_on", title="scored on", shown=len(places) > 1),
        Column(key="scores", title="scores", numeric=True, about="Folds and seeds together.", shown=len(counts) > 1),
        Column(key="", title=f"{one}, mean ± sd", numeric=True, exported=False),
        Column(key="mean", title="mean", numeric=True, shown=False),
        Column(key="sd", title="sd", numeric=True, shown=False),
        Column(key="", title="95 % interval", numeric=True, exported=False, about="Of the mean."),
        Column(key="ci_low", title="low", numeric=True, shown=False),
        Column(key="ci_high", title="high", numeric=True, shown=False),
    ]
    several = len(rows) > 1
    columns += [
        Column(key="difference", title=f"against {baseline.name}", numeric=True, shown=several),
        Column(key="", title="95 % interval of it", numeric=True, exported=False, shown=several),
        Column(key="difference_low", title="low", numeric=True, shown=False),
        Column(key="difference_high", title="high", numeric=True, shown=False),
        Column(key="t", title="t", numeric=True, shown=False),
        Column(key="p", title="p", numeric=True, shown=False),
        Column(key="p_holm", title="p (Holm)", numeric=True, shown=several, about="Corrected for all comparisons."),
        Column(key="trainable_params", title="trained parameters", numeric=True),
        Column(key="adapter_params", title="without the head", numeric=True),
        Column(key="wall_s", title="time", numeric=True, about="Of a run, all folds together."),
        Column(key="samples_per_s", title="samples/s", numeric=True, about="In training."),
        Column(key="peak_rss_mb", title="memory, MiB", numeric=True, about="Largest resident memory of the process."),
        Column(
            key="peak_gpu_mb",
            title="GPU memory, MiB",
            numeric=True,
            shown=any(setting.value("peak_gpu_mb") is not None for setting in settings),
        ),
    ]
    return Table(
        key="comparison",
        title="Comparison",
        columns=columns,
        rows=[_compared_row(row, baseline) for row in rows],
        notes=notes(rows, baseline),
    )


def _compared_row(row: Compared, baseline: Setting) -> list[Cell]:
    setting, summary, test = row.setting, row.setting.summary, row.test
    mean, sd = (summary.mean, summary.sd) if summary else (None, None)
    low, high = (summary.low, summary.high) if summary else (None, None)
    both = MISSING if mean is None else score(mean).text + (f" ± {score(sd).text}" if sd is not None else "")
    if setting is baseline:
        difference = Cell("baseline", 0.0)
    elif test is None:
        difference = Cell(row.reason)
    else:
        difference = signed(test.difference)
    return [
        Cell.of(setting.name),
        Cell.of(setting.config.recipe or MISSING),
        Cell.of(setting.stack),
        Cell.of(setting.metric),
        Cell.of(setting.scored_on),
        whole(len(setting.scores)),
        Cell(both, mean),
        score(mean),
        score(sd),
        interval(low, high),
        score(low),
        score(high),
        difference,
        interval(test.low, test.high, signs=True) if test else Cell(MISSING),
        signed(test.low if test else None),
        signed(test.high if test else None),
        signed(test.t if test else None, 2),
        p_value(test.p if test else None),
        p_value(row.adjusted),
        whole(setting.value("trainable_params")),
        whole(setting.value("adapter_params")),
        seconds(setting.value("wall_s")),
        whole(setting.value("samples_per_s")),
        whole(setting.value("peak_rss_mb")),
        whole(setting.value("peak_gpu_mb")),
    ]


def interval(low: float | None, high: float | None, *, signs: bool = False) -> Cell:
    """Such as "0.93 to 0.95"; sorted by its lower end."""
    if low is None or high is None:
        return Cell(MISSING)
    form = signed if signs else score
    return Cell(f"{form(low).text} to {form(high).text}", low)


def notes(rows: Sequence[Compared], baseline: Setting) -> list[str]:
    """How the numbers of the comparison came about, and what they do not say."""
    settings = [row.setting for row in rows]
    found: list[str] = []
    counts = {len(setting.scores) for setting in settings}
    each = f"{counts.pop()} scores each. " if len(counts) == 1 and max(counts) > 1 else ""
    places = {setting.scored_on for setting in settings}
    if "held-out folds" in places:
        found.append(
            f"{each}Scores of held-out folds, each measured once with the epoch that an inner validation part picked. "
            "Folds share training data; intervals and tests therefore use the variance of Nadeau and Bengio (2003), "
            "corrected by the ratio of held-out to training samples."
        )
    if "test split" in places:
        found.append(
            "Scores on the test split. Intervals and tests over several seeds say how training varies, "
            "not how much another test split would change the scores."
        )
    if "validation" in places:
        found.append(
            "Scores on the validation data that also picked the epoch"
            + (" and, in a sweep, the trial" if any(r.trial for s in settings for r in s.records) else "")
            + ": they are too good, and only fit to compare settings."
        )
    tests = [row for row in rows if row.adjusted is not None]
    if tests:
        found.append(
            f"Differences to {baseline.name}: paired over the same folds and seeds, two-sided t-test; p corrected by "
            f"Holm's method for {len(tests)} comparison{'s' if len(tests) > 1 else ''}."
        )
    single = [row.setting.name for row in rows if row.setting.summary and row.setting.summary.count == 1]
    if single:
        listed = ", ".join(single[:5]) + (f" and {len(single) - 5} more" if len(single) > 5 else "")
        found.append(f"A single score, so no spread: {listed}. cv.folds=5 or seeds=[0,1,2] would give one.")
    return found


def to_markdown(table: Table) -> str:
    """A pipe table."""
    columns, rows = table.shown()
    lines = [[column.title for column in columns], ["---:" if column.numeric else "---" for column in columns]]
    lines += [[cell.text for cell in row] for row in rows]
    return "".join("| " + " | ".join(_pipes(text) for text in line) + " |\n" for line in lines)


def _pipes(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def to_csv(table: Table) -> str:
    """All columns with their values, numbers in full."""
    places = [place for place, column in enumerate(table.columns) if column.exported]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([table.columns[place].key for place in places])
    for row in table.rows:
        writer.writerow(["" if row[place].value is None else _plain(row[place].value) for place in places])
    return out.getvalue()


def _plain(value: float | str | None) -> str:
    """A number in full; text that a spreadsheet would take for a formula gets an apostrophe."""
    if isinstance(value, float):
        return f"{value:.10g}"
    text = str(value)
    return f"'{text}" if text[:1] in "=+@" else text


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "<": "$<$", ">": "$>$",
}  # fmt: skip


def to_latex(table: Table) -> str:
    """A tabular with the rules of the package booktabs."""
    columns, rows = table.shown()
    lines = [[column.title for column in columns], *([cell.text for cell in row] for row in rows)]
    texts = [" & ".join(_escaped(text) for text in line) + r" \\" for line in lines]
    align = "".join("r" if column.numeric else "l" for column in columns)
    return (
        "\n".join(
            [
                rf"\begin{{tabular}}{{{align}}}",
                r"\toprule",
                texts[0],
                r"\midrule",
                *texts[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)


FORMATS = {"md": to_markdown, "csv": to_csv, "latex": to_latex}
