"""What a report says of single samples: predictions, the hardest examples, attention maps.

All of it needs the run's data, and most of it the model. Predictions are kept in RUN/predictions.csv.
"""

import base64
import csv
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coeft.errors import UserError
from coeft.report.coefficients import negative_mass
from coeft.report.read import Record
from coeft.run import read_json, write_text

if TYPE_CHECKING:
    from coeft.assemble import Assembled
    from coeft.data._folds import Fold
    from coeft.data._part import Part

log = logging.getLogger("coeft")

FILE = "predictions.csv"
THUMBNAIL = 112  # pixels of the longer side
TEXT = 280  # characters
IMAGES = 16  # that attention maps are measured on


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the fold's model says of a sample that it has not seen in training."""

    fold: int
    index: int
    """Its place in the part that was scored."""
    name: str
    label: str
    prediction: str
    confidence: float
    """Probability of the predicted class."""
    label_probability: float
    """Probability of the true class."""

    @property
    def right(self) -> bool:
        return self.label == self.prediction


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample as a page shows it."""

    name: str
    label: str
    prediction: str
    percent: str
    image: str | None = None
    """A data URI."""
    tiny: bool = False
    """Few pixels, to be enlarged without blurring."""
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Attention of one image before and after mixing, and how much of the new maps is negative."""

    image: np.ndarray
    """(h, w, 3) or (h, w), in [0, 1]."""
    name: str
    maps: list[tuple[str, np.ndarray, np.ndarray]]
    """Name of a head, its map before and after, (rows, columns) of patches; empty if the tokens are no grid."""
    of: str
    """Whose attention the maps show: the class token's, or the mean over all tokens."""
    negative: dict[str, float]
    """Layer -> share of the mass of its new maps that is negative, the mean over heads and images."""


class Opened:
    """The data and the models of a run, loaded when they are first asked for."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.config = replace(record.config, trainer=replace(record.config.trainer, progress=False))
        self._folds: list[Fold] = []
        self._model: tuple[int | None, Assembled, list[str]] | None = None

    def model(self, fold: int | None) -> "tuple[Assembled, list[str]]":
        """A trained model and its class names; the last one is kept.

        Raises:
            UserError: the base model or the adapter is not there any more, or does not fit.
        """
        from coeft.assemble import restore, set_threads, settle

        if self._model is None or self._model[0] != fold:
            environment = self.record.run.path / "environment.json"
            if self.config.trainer.threads is None and environment.is_file():
                import torch

                torch.set_num_threads(read_json(environment)["threads"])
            set_threads(self.config)
            built, class_names = restore(self.config, self.record.run.adapter(fold))
            settle(built).backbone.model.eval()
            self._model = fold, built, class_names
        return self._model[1], self._model[2]

    def part(self, fold: int | None) -> "Part":
        """The samples that a fold was scored on, as train.py chooses them.

        Raises:
            UserError: the data is not there any more, or is not what the run was trained on.
        """
        from coeft.assemble import encoder
        from coeft.data._data import load_data
        from coeft.data._folds import make_folds

        if not self._folds:
            built, _ = self.model(fold)
            data = load_data(
                self.config.data,
                seed=self.config.seed,
                encoder=encoder(self.config, built.backbone),
                target=self.config.task.target,
                group=self.config.cv.group,
            )
            if self.record.fingerprint is not None and data.fingerprint != self.record.fingerprint:
                raise UserError("the data is not what the run was trained on")
            self._folds = make_folds(data, self.config.cv, self.config.seed)
        parts = self._folds[fold or 0]
        chosen = next((part for part in (parts.heldout, parts.test, parts.val) if part is not None), None)
        if chosen is None:
            raise UserError("there is no data that the run was not trained on")
        return chosen

    @property
    def folds(self) -> list[int | None]:
        """The folds of a cross-validation, or None alone."""
        return list(self.record.run.folds) or [None]


def predictions(opened: Opened) -> list[Prediction]:
    """Every scored sample of a run with one class a sample, from RUN/predictions.csv, or else written there.

    Raises:
        UserError: another kind of task, or the data or the model is not there any more.
    """
    target = getattr(opened.config.task, "target", None)
    if target != "class":
        raise UserError(f"the task {opened.config.task.kind} does not predict one class a sample")
    path = opened.record.run.path / FILE
    if path.is_file():
        return read(path)
    log.info("%s: predictions of %d model%s", opened.record.name, len(opened.folds), "s"[: len(opened.folds) > 1])
    found = [row for fold in opened.folds for row in _predicted(opened, fold)]
    try:
        write_text(path, to_csv(found))
    except OSError as error:
        log.warning("%s cannot be written (%s): the next report predicts again", path, error.strerror)
    return found


def _predicted(opened: Opened, fold: int | None) -> Iterable[Prediction]:
    import torch

    from coeft.assemble import make_trainer
    from coeft.data._module import FoldData

    built, class_names = opened.model(fold)
    part = opened.part(fold)
    loader = FoldData.evaluation_loader(part, batch_size=opened.config.data.batch_size, num_workers=0)
    logits = make_trainer(opened.config, Path.cwd()).predict(built.module, dataloaders=loader)
    assert logits is not None
    shares = built.module.task.scores(torch.cat([batch.cpu() for batch in logits])).numpy()  # type: ignore[union-attr]
    return rows(shares, part.labels, part.names, class_names, fold or 0)


def rows(
    shares: np.ndarray, labels: np.ndarray, names: Sequence[str] | np.ndarray, class_names: Sequence[str], fold: int
) -> list[Prediction]:
    """Predictions out of the probability of each class, (N, classes), and the labels, int64 (N,)."""
    best = shares.argmax(1)
    return [
        Prediction(
            fold=fold,
            index=index,
            name=str(names[index]),
            label=class_names[labels[index]],
            prediction=class_names[best[index]],
            confidence=float(shares[index, best[index]]),
            label_probability=float(shares[index, labels[index]]),
        )
        for index in range(len(shares))
    ]


def to_csv(found: Sequence[Prediction]) -> str:
    """Predictions as the text of RUN/predictions.csv."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [spec.name for spec in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    for row in found:
        short = {"confidence": f"{row.confidence:.7g}", "label_probability": f"{row.label_probability:.7g}"}
        writer.writerow(asdict(row) | short)
    return out.getvalue()


def read(path: Path) -> list[Prediction]:
    """The predictions in a file that `to_csv` wrote.

    Raises:
        UserError: it is another file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Prediction(
                    fold=int(row["fold"]),
                    index=int(row["index"]),
                    name=row["name"],
                    label=row["label"],
                    prediction=row["prediction"],
                    confidence=float(row["confidence"]),
                    label_probability=float(row["label_probability"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it to predict again"
        ) from error


def hardest(opened: Opened, found: Sequence[Prediction], count: int) -> list[Shown]:
    """The wrong predictions that gave the true class the lowest probability, as pictures or texts.

    Raises:
        UserError: the data is not there any more.
    """
    wrong = sorted((row for row in found if not row.right), key=lambda row: (row.label_probability, row.name))[:count]
    return [_shown(opened, row) for row in wrong]


def _shown(opened: Opened, row: Prediction) -> Shown:
    fold = row.fold if opened.record.run.folds else None
    part = opened.part(fold)
    shown = Shown(
        name=row.name, label=row.label, prediction=row.prediction, percent=f"{100 * row.confidence:.0f} % sure"
    )
    built, _ = opened.model(opened._model[0] if opened._model else fold)
    backbone = built.backbone
    if backbone.modality != "text":
        pixels = _pixels(built, part, row.index)
        return replace(shown, image=thumbnail(pixels), tiny=max(pixels.shape[-2:]) <= 64)
    tokens = part.batch([row.index])["input_ids"][0]
    text = " ".join(backbone.tokenizer.decode(tokens, skip_special_tokens=True).split())
    return replace(shown, text=text if len(text) <= TEXT else text[: TEXT - 1] + "…")


def _pixels(built: "Assembled", part: "Part", index: int) -> np.ndarray:
    """A sample as a picture, uint8 (C, H, W): an image, or the spectrogram of a sound."""
    if built.backbone.hearing is None:
        image: np.ndarray = part.fetch([index])[0]
        return image
    prepare: Any = built.module.prepare
    sound = part.batch([index])["sound"].to(prepare.front.window.device)
    shades: np.ndarray = (255 * prepare.shades(sound)).round().byte().cpu().numpy()
    return shades


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (C, H, W) as a data URI of a small picture."""
    from PIL import Image

    image = Image.fromarray(pixels[0]) if len(pixels) == 1 else Image.fromarray(pixels[:3].transpose(1, 2, 0))
    small = max(image.size) <= 64
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, format="PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def mixed(opened: Opened, heads: Sequence[tuple[int, int]], count: int = 4) -> Mixed:
    """Attention maps of the first scored image before and after mixing, in the run's first model.

    Args:
        heads: (layer, head) to show, counted among the layers that coeff mixes; empty for the ones that changed most.
        count: how many, if none are chosen.
    Raises:
        UserError: no coeff, no images, a head that is not there, or the data or the model is not there any more.
    """
    import torch

    built, _ = opened.model(opened.folds[0])
    mixers: dict[str, Any] = {
        name: mixer
        for attachment in built.stack.attachments
        if attachment.kind == "coeff"
        for name, mixer in attachment.probes.items()
    }
    if built.backbone.modality != "image":
        raise UserError("attention maps are shown of images only")
    layers = list(mixers)
    alphas = [mixers[name].alpha().detach().cpu().numpy() for name in layers]
    chosen = list(heads) or _most_changed(alphas, count)
    for layer, head in chosen:
        if not (0 <= layer < len(layers) and 0 <= head < len(alphas[layer])):
            raise UserError(f"--heads {layer}:{head}: there are {len(layers)} layers with {len(alphas[0])} heads")
    part = opened.part(opened.folds[0])
    device = next(built.backbone.model.parameters()).device
    batch = {name: value.to(device) for name, value in part.batch(range(min(IMAGES, len(part)))).items()}
    seen: dict[str, Any] = {}
    negative: dict[str, float] = {}

    def watch(layer: int) -> Any:
        wanted = [head for place, head in chosen if place == layer]

        def look(mixer: Any, args: Any, output: Any) -> None:
            if len(args) != 1 or output.dim() != 4:
                return
            negative[layers[layer]] = float(negative_mass(output.float().cpu().numpy()).mean())
            for head in wanted:
                seen[f"{layer}:{head}"] = args[0][0, head].float().cpu().numpy(), output[0, head].float().cpu().numpy()

        return look

    routes = {name: mixer.route for name, mixer in mixers.items()}
    hooks = [mixers[name].register_forward_hook(watch(place)) for place, name in enumerate(layers)]
    try:
        for mixer in mixers.values():
            mixer.route = "maps"
        built.module.eval()
        with torch.no_grad():
            built.module(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for name, mixer in mixers.items():
            mixer.route = routes[name]
    if not negative:
        raise UserError("this model does not hand out its attention maps")
    model = built.backbone.model
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    pixels = _pixels(built, part, 0)
    return Mixed(
        image=(pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0)) / 255,
        name=str(part.names[0]),
        maps=[
            (f"{layers[layer].removesuffix('.attn')}, head {head}", before, after)
            for layer, head in chosen
            if f"{layer}:{head}" in seen
            and (before := _grid(seen[f"{layer}:{head}"][0], model, prefix)) is not None
            and (after := _grid(seen[f"{layer}:{head}"][1], model, prefix)) is not None
        ],
        of="the class token" if prefix else "all tokens, their mean",
        negative=negative,
    )


def _most_changed(alphas: Sequence[np.ndarray], count: int) -> list[tuple[int, int]]:
    """(layer, head) with the largest rows of α, in the order of the layers."""
    size = {
        (layer, head): float(np.linalg.norm(row))
        for layer, alpha in enumerate(alphas)
        for head, row in enumerate(alpha)
    }
    return sorted(sorted(size, key=lambda place: -size[place])[:count])


def _grid(weights: np.ndarray, model: Any, prefix: int) -> np.ndarray | None:
    """Attention over image patches, (rows, columns), of a map (N, M); None if the tokens are not such a grid."""
    row = weights[0] if prefix else weights.mean(0)
    patches = row[prefix:]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    side = round(len(patches) ** 0.5)
    rows_, columns = grid if grid is not None else (side, side)
    return patches.reshape(rows_, columns) if rows_ * columns == len(patches) else None
