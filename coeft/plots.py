"""Pictures of a run as PNG files."""

import csv
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import font_manager  # noqa: E402 (the backend is chosen first: there is no screen)
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from coeft.adapt import Attachment, Stack  # noqa: E402

DPI = 120
# After matplotlib's own: fonts with the letters that it lacks, for names of classes and files.
FONTS = [
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans", "Noto Sans Arabic",
    "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Malgun Gothic", "Nirmala UI", "Segoe UI Symbol",
]  # fmt: skip
THUMBNAIL = 104  # pixels
GAP = 8  # pixels between thumbnails, and above the line with their names


def _use_fonts() -> None:
    there = set(font_manager.get_font_names())
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in FONTS if name in there)]
    plt.rcParams["text.parse_math"] = False  # a name may hold dollar signs


_use_fonts()


def curves(metrics_csv: Path, metric: str, path: Path) -> None:
    """Training loss by step, and validation loss and metric by epoch, one line per fold."""
    steps: dict[int, list[tuple[int, float]]] = defaultdict(list)
    epochs: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            fold = int(row["fold"])
            if row["train/loss"]:
                steps[fold].append((int(row["step"]), float(row["train/loss"])))
            for name in ("val/loss", f"val/{metric}"):
                if row.get(name):
                    epochs[name][fold].append((int(row["epoch"]), float(row[name])))
    figure, axes = plt.subplots(1, 1 + len(epochs), figsize=(4.5 * (1 + len(epochs)), 3.4), layout="constrained")
    axes = [axes] if not epochs else list(axes)
    for fold, points in sorted(steps.items()):
        axes[0].plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.8, label=f"fold {fold}")
    axes[0].set(title="training loss", xlabel="optimizer step", ylabel="nats")
    for axis, (name, folds) in zip(axes[1:], epochs.items(), strict=True):
        for fold, points in sorted(folds.items()):
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=f"fold {fold}")
        axis.set(title=f"validation {name.removeprefix('val/')}", xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.25)
    if len(steps) > 1:
        axes[-1].legend(fontsize="small")
    _save(figure, path)


def confusion(counts: Tensor, class_names: list[str], path: Path) -> None:
    """The confusion matrix as shares of each true class; counts (true class, predicted class)."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    size = min(16.0, 2.5 + 0.4 * len(class_names))
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= 50:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize="small")
        axis.set_yticks(range(len(class_names)), class_names, fontsize="small")
    if len(class_names) <= 20:
        for row in range(len(class_names)):
            for column in range(len(class_names)):
                if counts[row, column]:
                    shade = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(
                        column, row, str(int(counts[row, column])), ha="center", va="center", color=shade, fontsize=7
                    )
    axis.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    _save(figure, path)


def bars(values: Sequence[float], names: Sequence[str], label: str, path: Path) -> None:
    """One horizontal bar for each name, the first at the top; values in [0, 1]."""
    height = min(16.0, 1.2 + 0.28 * len(names))
    figure, axis = plt.subplots(figsize=(6, height), layout="constrained")
    axis.barh(range(len(names)), values, color="tab:blue")
    if len(names) <= 60:
        axis.set_yticks(range(len(names)), names, fontsize="small")
    axis.set(xlabel=label, xlim=(0, 1))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    _save(figure, path)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Thumbnails in a row of a contact sheet."""

    label: str
    cells: Sequence[tuple[np.ndarray, str] | None]
    """Pixels, uint8 (C, H, W), and a name; None leaves the place empty."""


def contact_sheet(rows: Sequence[Row], columns: Sequence[str], title: str, path: Path) -> None:
    """Examples of images, as the model gets them.

    Args:
        columns: a heading for each cell of a row; equal ones that follow each other stand once.
    """
    left, top, line = 190, 48, 16
    cell, height = THUMBNAIL + GAP, THUMBNAIL + GAP + line
    canvas = np.full((top + height * len(rows), left + cell * len(columns), 3), 255, np.uint8)
    figure = plt.figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI), dpi=DPI)
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set_axis_off()
    for r, row in enumerate(rows):
        y = top + r * height
        axis.text(GAP, y + THUMBNAIL / 2, _wrapped(row.label, 26), va="center", fontsize=7)
        for c, pair in enumerate(row.cells):
            if pair is not None:
                x = left + c * cell
                picture = _thumbnail(pair[0])
                canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
                axis.text(x, y + THUMBNAIL + 2, _shortened(pair[1], 22), va="top", fontsize=4.5, color="dimgray")
    for c, name in enumerate(columns):
        if c == 0 or columns[c - 1] != name:
            axis.text(left + c * cell, top - 8, name, fontsize=7, weight="bold")
    axis.text(GAP, 8, title, va="top", fontsize=7, color="dimgray")
    axis.imshow(canvas, interpolation="nearest")
    with _any_letters():
        figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of at most THUMBNAIL pixels a side; few pixels are enlarged without blurring."""
    image = Image.fromarray(pixels[0]) if len(pixels) < 3 else Image.fromarray(pixels[:3].transpose(1, 2, 0))
    scale = THUMBNAIL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return np.asarray(image.convert("RGB").resize((size[0], size[1]), resample))


def _shortened(text: str, length: int) -> str:
    """The end of a text, which tells files apart."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _wrapped(text: str, length: int) -> str:
    """A text in lines of at most so many letters, at most six of them."""
    lines = [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, length) or [""]]
    return "\n".join(lines[:6])


def scatter(points: Sequence[Sequence[float]], path: Path) -> None:
    """Predicted over true values, (N, 2) of true, predicted, with the line where both are equal."""
    true, predicted = zip(*points, strict=True)
    low, high = min(*true, *predicted), max(*true, *predicted)
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axis.plot([low, high], [low, high], color="gray", linewidth=0.8)
    axis.scatter(true, predicted, s=8, alpha=0.5, linewidths=0)
    axis.set(xlabel="true value", ylabel="predicted value")
    axis.grid(alpha=0.25)
    _save(figure, path)


@dataclass(frozen=True, kw_only=True)
class Spectrograms:
    """What pictures of spectrograms have in common."""

    centres: Sequence[float]
    """Hz of the middle of each band."""
    frame_rate: float
    """Frames a second."""
    unit: str
    """Of the values."""
    low: float | None = None
    high: float | None = None
    """Values at the ends of the colours; null is the least and the largest of all."""


def spectrograms(panels: Sequence[Sequence[tuple[str, np.ndarray]]], look: Spectrograms, path: Path) -> None:
    """Rows of spectrograms (bands, frames) with a title each, on one scale of colours."""
    columns = max(map(len, panels))
    figure, axes = plt.subplots(
        len(panels), columns, figsize=(2.9 * columns + 1, 2.2 * len(panels) + 0.5), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    every = [array for row in panels for _, array in row]
    low = min(float(array.min()) for array in every) if look.low is None else look.low
    high = max(float(array.max()) for array in every) if look.high is None else look.high
    bands = len(look.centres)
    marks: list[int] = []
    places: list[float] = []
    for hz in (20_000, 10_000, 5000, 2000, 1000, 500, 200, 100):
        place = float(np.interp(hz, look.centres, np.arange(bands)))
        if look.centres[0] <= hz <= look.centres[-1] and (not places or places[-1] - place >= bands / 12):
            marks.append(hz)
            places.append(place)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, axis_row in zip(panels, axes, strict=True):
        for (title, array), axis in zip(row, axis_row, strict=False):
            axis.set_axis_on()
            seconds = array.shape[1] / look.frame_rate
            image = axis.imshow(
                array, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest",
                extent=(0, seconds, -0.5, bands - 0.5),
            )  # fmt: skip
            axis.set_title(title if len(title) <= 40 else f"…{title[-39:]}", fontsize="x-small")
            axis.set_yticks(places, [f"{hz:g}" for hz in marks], fontsize="x-small")
            axis.tick_params(axis="x", labelsize="x-small")
    figure.supxlabel("seconds", fontsize="small")
    figure.supylabel("Hz", fontsize="small")
    figure.colorbar(image, ax=axes, label=look.unit, shrink=0.8)
    _save(figure, path)


def coefficients(stack: Stack, path: Path) -> None:
    """α of every layer that coeff mixes, as heat maps on one scale with zero in the middle; nothing without coeff."""
    matrices = {
        name: parameter.detach().float().cpu()
        for attachment in stack.attachments
        if attachment.kind == "coeff"
        for name, parameter in alphas(attachment).items()
    }
    if not matrices:
        return
    columns = min(6, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.1 * columns + 1, 2.3 * rows + 0.6), layout="constrained", squeeze=False
    )
    largest = max(float(matrix.abs().max()) for matrix in matrices.values()) or 1.0
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    for axis, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
        image = axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(name, fontsize="small")
        axis.set_xticks([0, len(matrix) - 1])
        axis.set_yticks([0, len(matrix) - 1])
        axis.tick_params(labelsize="x-small")
    figure.supxlabel("head whose map is used", fontsize="small")
    figure.supylabel("head that is tuned", fontsize="small")
    figure.suptitle("learnt coefficients α (identity left out)", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)


def alphas(attachment: Attachment) -> dict[str, Tensor]:
    """Site name -> α (H, H) of a coeff attachment, in its portable form (the identity left out)."""
    _, tensors = attachment.pack()
    return {name.removeprefix("base_model.model.").rsplit(".", 2)[0]: tensor for name, tensor in tensors.items()}


def _save(figure: plt.Figure, path: Path) -> None:
    with _any_letters():
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


@contextmanager
def _any_letters() -> Iterator[None]:
    """Letters that no font of this machine has are drawn as boxes without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
