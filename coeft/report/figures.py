"""Figures of a report: drawn once, written as PNG and SVG files or put into a page as inline SVG.

A page has a light and a dark theme. In inline SVG the colours of INK, SOFT, LINE and SERIES become the CSS variables
that the page sets for each theme, so one drawing serves both.
"""

import csv
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from coeft.report.read import Setting
from coeft.report.statistics import Bin, pareto

P = ParamSpec("P")
R = TypeVar("R")

INK, SOFT, LINE = "#1b1d20", "#5b6168", "#d5d9de"
SERIES = ("#0f6cbd", "#b25a00", "#2c7a35", "#8a41ab", "#00798a", "#b8352a")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 160
POINTS = 150  # of a line, at most
NAMED = 30  # rows or labels that can still be read
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the style of reports, whatever matplotlib is set to."""

    @wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with the words that belong to it."""

    key: str
    """Name of its files, such as confusion-lora."""
    title: str
    caption: str
    alt: str
    """What it shows, for those who cannot see it."""
    canvas: Canvas

    def save(self, folder: Path) -> list[Path]:
        """Write KEY.png and KEY.svg; returns both."""
        paths = [folder / f"{self.key}.{suffix}" for suffix in ("png", "svg")]
        for path in paths:
            path.write_bytes(_rendered(self, path.suffix[1:], clear=False))
        return paths

    def inline(self) -> tuple[str, int]:
        """An <svg> element for a page, and its width in pixels: ids of its own, no addresses, colours by theme."""
        text = _rendered(self, "svg", clear=True).decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        text = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, _own_ids(text, self.key))
        for name, colour in _variables().items():
            text = text.replace(colour, f"var({name})")
        text = re.sub(r"font: ([^;\"']*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", text)
        text = re.sub(r" ?font-family: [^;\"]*;", "", text)
        size = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
        assert size is not None
        for _ in range(2):
            text = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", text, count=1)
        label = self.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1), round(float(size[1]) * 4 / 3)


def _variables() -> dict[str, str]:
    return {"--ink": INK, "--soft": SOFT, "--line": LINE, **{f"--c{n}": colour for n, colour in enumerate(SERIES)}}


def _rounded(places: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, which halves the page."""
    return re.sub(r"(\.\d\d)\d+", r"\1", places[0])


def _own_ids(text: str, key: str) -> str:
    """Ids that nothing refers to go; the others begin with the figure's key."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    prefix = re.sub(r"\W+", "-", key)
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)


def _rendered(figure: Figure, suffix: str, *, clear: bool) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if suffix == "svg" else {"Software": None}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure.key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's font has it
        if figure.canvas.get_layout_engine() is not None:  # once is enough: it takes most of the time
            figure.canvas.draw_without_rendering()
            figure.canvas.set_layout_engine("none")
        figure.canvas.savefig(
            out, format=suffix, dpi=DPI, transparent=clear, metadata=metadata, bbox_inches="tight", pad_inches=0.05
        )
    return out.getvalue()


def _canvas(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    layout: Literal["constrained", "compressed"] = "constrained",
    **kwargs: Any,
) -> tuple[Canvas, np.ndarray]:
    """A figure of so many inches, and its axes (rows, columns)."""
    canvas = Canvas(figsize=(width, height), layout=layout)
    return canvas, canvas.subplots(rows, columns, squeeze=False, **kwargs)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


@styled
def scores(settings: Sequence[Setting]) -> Figure:
    """Every score as a dot, the mean as a diamond with its confidence interval; a row per setting."""
    known = [setting for setting in settings if setting.summary is not None]
    ranked = sorted(known, key=_rank)[:NAMED]
    kept = [setting for setting in known if setting in ranked]
    canvas, [[axis]] = _canvas(4.7, 0.9 + 0.34 * len(kept))
    for row, setting in enumerate(reversed(kept)):
        summary = setting.summary
        assert summary is not None
        values = list(setting.scores.values())
        spots = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else [0.0]
        axis.plot(values, row + np.asarray(spots), "o", color=SERIES[0], markersize=4, alpha=0.55, mec="none")
        if summary.low is not None:
            axis.plot([summary.low, summary.high], [row, row], color=INK, linewidth=1.2)
        axis.plot(summary.mean, row, "D", color=INK, markersize=5)
    axis.set_yticks(range(len(kept)), [_short(setting.name) for setting in reversed(kept)])
    axis.set_ylim(-0.6, len(kept) - 0.4)
    axis.grid(False, axis="y")
    metric = _words(kept[0].metric)
    axis.set_xlabel(metric)
    best = ranked[0]
    assert best.summary is not None
    return Figure(
        key="scores",
        title="Scores",
        caption=(
            "Dots: folds and seeds. Diamond and line: mean and its 95 % interval."
            if any(len(setting.scores) > 1 for setting in kept)
            else "A single score each."
        )
        + (f" The {len(kept)} best of {len(known)}." if len(kept) < len(known) else ""),
        alt=f"{metric} of {len(kept)} settings; best {best.name} with mean {best.summary.mean:.4f}. "
        "The comparison table holds the numbers.",
        canvas=canvas,
    )


def _rank(setting: Setting) -> float:
    """Smaller is better."""
    assert setting.summary is not None
    return -setting.summary.mean if setting.larger_is_better else setting.summary.mean


@styled
def parameters(settings: Sequence[Setting]) -> Figure | None:
    """Mean score against trainable parameters on a log scale, and the Pareto front; None for less than two settings."""
    known = [s for s in settings if s.summary is not None and (s.value("trainable_params") or 0) > 0]
    if len(known) < 2:
        return None
    points = [(s.value("trainable_params") or 0.0, -_rank(s)) for s in known]
    front = pareto(points)
    canvas, [[axis]] = _canvas(4.9, 3.6)
    sign = 1 if known[0].larger_is_better else -1
    means = [sign * score for _, score in points]
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    costs = [cost for cost, _ in points]
    narrow = max(costs) < 10 * min(costs)  # too few powers of ten to read the axis by
    axis.xaxis.set_minor_formatter(axis.xaxis.get_major_formatter() if narrow else NullFormatter())
    if narrow:
        axis.tick_params(axis="x", which="minor", labelsize=7, rotation=45)
    axis.plot(
        [points[n][0] for n in front], [means[n] for n in front], color=SERIES[1], drawstyle="steps-post", zorder=1,
        label="Pareto front",
    )  # fmt: skip
    for place, setting in enumerate(known):
        summary = setting.summary
        assert summary is not None
        on = place in front
        if summary.low is not None and len(known) <= NAMED:
            axis.plot([points[place][0]] * 2, [summary.low, summary.high], color=SOFT, linewidth=0.9, zorder=2)
        axis.plot(
            *(points[place][0], means[place]), "o" if on else "s", color=SERIES[1] if on else SERIES[0],
            markersize=6.5 if on else 5, zorder=3,
        )  # fmt: skip
    axis.set(xlabel="trained parameters", ylabel=_words(known[0].metric))
    axis.margins(x=0.12, y=0.12)
    axis.legend(loc="lower right")
    named = range(len(known)) if len(known) <= 14 else front[:14]
    bars = [
        (points[n][0], s.summary.low, s.summary.high)
        for n, s in enumerate(known)
        if s.summary is not None and s.summary.low is not None and s.summary.high is not None
    ]
    _label(
        canvas,
        axis,
        [(points[n][0], means[n], _short(known[n].name, 22)) for n in named],
        steps=[(points[n][0], means[n]) for n in front],
        bars=bars if len(known) <= NAMED else [],
    )
    best = " then ".join(known[n].name for n in front)
    return Figure(
        key="parameters",
        title=f"{_words(known[0].metric).capitalize()} against trained parameters",
        caption="Settings on the line are not beaten: nothing is both cheaper and better. Bars: 95 % interval.",
        alt=f"Scores of {len(known)} settings against trained parameters. On the Pareto front, cheapest first: {best}.",
        canvas=canvas,
    )


def _label(
    canvas: Canvas,
    axis: Axes,
    points: Sequence[tuple[float, float, str]],
    *,
    steps: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, float, float]],
) -> None:
    """Write names beside points, where they cover no other name, no point and no line, as far as there is room.

    Args:
        steps: corners of the stepped line.
        bars: x, lower and upper end of upright lines.
    """
    canvas.draw_without_rendering()
    scale = canvas.dpi / 72
    place = axis.transData.transform
    spots = [place((x, y)) for x, y, _ in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    for (x0, y0), (x1, y1) in pairwise(place(corner) for corner in steps):
        taken += [(x0, y0 - scale, x1, y0 + scale), (x1 - scale, min(y0, y1), x1 + scale, max(y0, y1))]
    for x, low, high in bars:
        (x0, y0), (_, y1) = place((x, low)), place((x, high))
        taken.append((x0 - scale, y0, x0 + scale, y1))
    left, right = axis.bbox.x0, axis.bbox.x1
    for (x, y, name), spot in zip(points, spots, strict=True):
        width, height = 4.9 * scale * len(name), 10 * scale
        best = None
        for dy in (0, 8, -8, 13, -13, 20, -20, 28, -28):
            for side in ("left", "right"):
                x0 = spot[0] + 8 * scale if side == "left" else spot[0] - 8 * scale - width
                box = (x0, spot[1] + dy * scale - height / 2, x0 + width, spot[1] + dy * scale + height / 2)
                covered = sum(_overlap(box, other) for other in taken)
                outside = max(0.0, left - box[0]) + max(0.0, box[2] - right)
                cost = covered + 20 * outside * scale + abs(dy)
                if best is None or cost < best[0]:
                    best = (cost, box, side, dy)
        assert best is not None
        taken.append(best[1])
        axis.annotate(
            name, (x, y), xytext=(8 if best[2] == "left" else -8, best[3]), textcoords="offset points", ha=best[2],
            va="center", fontsize=8, color=INK,
        )  # fmt: skip


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


@styled
def curves(setting: Setting, key: str) -> Figure | None:
    """Training loss by step, validation loss and metric by epoch, a line per fold; None without metrics.csv."""
    steps: dict[str, list[tuple[float, float]]] = defaultdict(list)
    epochs: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in setting.records:
        path = record.run.path / "metrics.csv"
        if path.is_file():
            names = [f"seed {record.config.seed}"] if len(setting.records) > 1 else []
            names += ["fold {fold}"] if record.run.folds or not names else []
            _read_curves(path, setting.metric, ", ".join(names), steps, epochs)
    if not steps:
        return None
    canvas, [axes] = _canvas(3.1 * (1 + len(epochs)), 2.6, 1, 1 + len(epochs))
    for axis, title, lines in (
        (axes[0], "training loss", {name: _windows(points) for name, points in steps.items()}),
        *(
            (axis, f"validation {_words(name)}", lines)
            for axis, (name, lines) in zip(axes[1:], epochs.items(), strict=True)
        ),
    ):
        for place, (name, points) in enumerate(sorted(lines.items())):
            axis.plot(
                *zip(*points, strict=True), color=SERIES[place % len(SERIES)], alpha=0.9, linewidth=1.1, label=name,
                marker=MARKERS[place % len(MARKERS)] if len(points) <= 30 else "", markersize=3,
            )  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("optimizer step" if axis is axes[0] else "epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if 1 < len(steps) <= 10:
        axes[-1].legend(loc="best", handlelength=1.2, labelspacing=0.2)
    return Figure(
        key=f"curves-{key}",
        title="Learning curves",
        caption="Training loss in windows of steps, validation after each epoch; a line per fold.",
        alt=f"Training loss, and validation loss and metric by epoch, of {setting.name}, {len(steps)} lines.",
        canvas=canvas,
    )


def _read_curves(path: Path, metric: str, form: str, steps: dict, epochs: dict) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = form.format(fold=row["fold"])
            if row.get("train/loss"):
                steps[name].append((float(row["step"]), float(row["train/loss"])))
            for column in dict.fromkeys(("val/loss", f"val/{metric}")):
                if row.get(column):
                    epochs[column.removeprefix("val/")][name].append((float(row["epoch"]), float(row[column])))


def _windows(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equally long stretches, POINTS / 3 at most: single steps are noisy."""
    count = min(len(points), POINTS // 3)
    return [tuple(np.asarray(part).mean(0)) for part in np.array_split(np.asarray(points), count)]


@styled
def confusion(counts: np.ndarray, class_names: Sequence[str], key: str) -> Figure:
    """The confusion matrix as shares of each true class; counts (true class, predicted class)."""
    number = len(class_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.4 + min(3.4, 0.28 * number)
    canvas, [[axis]] = _canvas(side + 1.1, side)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    step = 1 if number <= NAMED else -(-number // NAMED)
    names = [_short(name, 14) for name in class_names][::step]
    size = 8 if number <= 16 else 6
    long = max(map(len, names)) > 2
    axis.set_xticks(range(0, number, step), names, rotation=90 if long else 0, fontsize=size)
    axis.set_yticks(range(0, number, step), names, fontsize=size)
    if number <= 16:
        for row, column in np.argwhere(counts > 0):
            shade = "#ffffff" if shares[row, column] > 0.5 else "#111111"  # not black, which SVG leaves out
            axis.text(
                column, row, f"{counts[row, column]:,}", ha="center", va="center", color=shade,
                fontsize=7 if counts.max() < 1000 else 5.5,
            )  # fmt: skip
    axis.set(xlabel="predicted class", ylabel="true class")
    bar = canvas.colorbar(image, ax=axis, shrink=0.75)
    bar.set_label("share of the true class")
    wrong = counts * (1 - np.eye(number, dtype=counts.dtype))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    worst = f"Most frequent mistake: {class_names[true]} taken for {class_names[predicted]}, {wrong.max():,} times."
    return Figure(
        key=f"confusion-{key}",
        title="Confusion matrix",
        caption="Counts over all folds and seeds. " + (worst if wrong.any() else "No mistake at all."),
        alt=f"Confusion matrix of {number} classes. {worst if wrong.any() else 'No mistake at all.'}",
        canvas=canvas,
    )


@styled
def reliability(bins: Sequence[Bin], error: float, key: str) -> Figure:
    """Accuracy of predictions against their confidence, and how many there are of each confidence."""
    canvas, axes = _canvas(3.6, 4.2, 2, 1, sharex=True, height_ratios=[3.2, 1])
    top, bottom = axes[:, 0]
    width = bins[0].high - bins[0].low
    filled = [each for each in bins if each.count]
    middles = [(each.low + each.high) / 2 for each in filled]
    top.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=SOFT, linewidth=1, label="perfectly calibrated")
    top.bar(middles, [e.accuracy for e in filled], width * 0.92, color=SERIES[0], label="accuracy")
    top.plot(
        [e.confidence for e in filled], [e.accuracy for e in filled], "D", color=INK, markersize=3.2,
        label="at mean confidence",
    )  # fmt: skip
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    top.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handlelength=1.4, columnspacing=1.0)
    total = sum(each.count for each in bins)
    bottom.bar(middles, [100 * e.count / total for e in filled], width * 0.92, color=SOFT)
    bottom.set(xlabel="confidence", ylabel="% of all")
    mean_confidence = sum(e.confidence * e.count for e in bins) / max(1, total)
    accuracy = sum(e.accuracy * e.count for e in bins) / max(1, total)
    way = "overconfident" if mean_confidence > accuracy else "underconfident"
    if abs(mean_confidence - accuracy) < 0.005:
        way = "neither over- nor underconfident"
    return Figure(
        key=f"reliability-{key}",
        title="Reliability",
        caption=f"Expected calibration error {error:.4f} ({len(bins)} bins, {total:,} predictions); on the whole "
        f"{way}: mean confidence {mean_confidence:.3f}, accuracy {accuracy:.3f}.",
        alt=f"Reliability diagram: calibration error {error:.4f}, mean confidence {mean_confidence:.3f}, "
        f"accuracy {accuracy:.3f}.",
        canvas=canvas,
    )


@styled
def coefficients(matrices: Mapping[str, np.ndarray], largest: float, key: str, caption: str) -> Figure:
    """α of every layer as heat maps on one scale with zero in the middle.

    Args:
        matrices: layer -> (H, H), row: the head that is tuned, column: the head whose map is used.
        largest: end of the scale, the same for all settings of a report.
    """
    columns = min(6, len(matrices))
    rows = -(-len(matrices) // columns)
    canvas, axes = _canvas(1.35 * columns + 1.3, 1.32 * rows + 0.5, rows, columns, layout="compressed")
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    for axis, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axis.grid(False)
        axis.set_title(_short(name, 18), fontsize=7.5)
        axis.set_xticks([0, len(matrix) - 1])
        axis.set_yticks([0, len(matrix) - 1])
        axis.tick_params(labelsize=7, length=2)
    canvas.supxlabel("head whose map is used", fontsize=8.5, color=INK)
    canvas.supylabel("head that is tuned", fontsize=8.5, color=INK)
    canvas.colorbar(image, ax=axes, shrink=0.85, aspect=14 * rows).ax.set_title("α", fontsize=9)
    top = max(matrices, key=lambda name: np.abs(matrices[name]).max())
    return Figure(
        key=f"coefficients-{key}",
        title="Learnt coefficients α",
        caption=caption,
        alt=f"Heat maps of α in {len(matrices)} layers; the largest entry, {np.abs(matrices[top]).max():.3f}, "
        f"is in {top}.",
        canvas=canvas,
    )


@styled
def layers(measures: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """What coeff learnt, by layer: a panel per measure, a line per setting, the range over fold models shaded.

    Args:
        measures: measure -> setting -> layer -> values of the fold models.
    """
    canvas, [axes] = _canvas(3.2 * len(measures), 2.7, 1, len(measures))
    for axis, (measure, lines) in zip(axes, measures.items(), strict=True):
        for place, (name, values) in enumerate(lines.items()):
            where = range(len(values))
            colour = SERIES[place % len(SERIES)]
            axis.plot(
                where, [float(np.mean(v)) for v in values], marker=MARKERS[place % len(MARKERS)], markersize=4,
                color=colour, label=_short(name, 22),
            )  # fmt: skip
            axis.fill_between(where, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, lw=0)
        axis.set_title(measure)
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if len(next(iter(measures.values()))) > 1:
        axes[0].legend(loc="best", handlelength=1.4)
    return Figure(
        key="layers",
        title="What coeff learnt, layer by layer",
        caption="Lines: mean over the fold models; shaded: their range.",
        alt="By layer: " + ", ".join(measures) + ". The table holds the numbers.",
        canvas=canvas,
    )


@styled
def attention(image: np.ndarray, maps: Sequence[tuple[str, np.ndarray, np.ndarray]], key: str, caption: str) -> Figure:
    """An image, and heads' attention over it before and after mixing.

    Args:
        image: (h, w, 3) or (h, w), in [0, 1].
        maps: name of a head, its map before and after, (rows, columns) of image patches.
    """
    canvas, axes = _canvas(1.35 * (len(maps) + 1) + 0.9, 3.3, 2, len(maps) + 1, layout="compressed")
    for axis in axes.flat:
        axis.grid(False)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0, 0].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes[0, 0].set_title("image", fontsize=8)
    axes[1, 0].set_axis_off()
    largest = max(float(np.abs(each).max()) for _, before, after in maps for each in (before, after)) or 1.0
    for column, (name, before, after) in enumerate(maps, 1):
        for row, each in enumerate((before, after)):
            shown = axes[row, column].imshow(each, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axes[0, column].set_title(name, fontsize=8)
    axes[0, 1].set_ylabel("before")
    axes[1, 1].set_ylabel("after")
    canvas.colorbar(shown, ax=axes, shrink=0.85, aspect=25).set_label("attention")
    return Figure(
        key=f"attention-{key}",
        title="Attention before and after mixing",
        caption=caption,
        alt="Attention maps over the patches of one image, before and after mixing: "
        + ", ".join(name for name, _, _ in maps),
        canvas=canvas,
    )
