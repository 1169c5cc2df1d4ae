"""Pictures of what a run hears: a clip of each class, and clips as augmentations change them."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from coeft import plots
from coeft.assemble import Assembled
from coeft.backbones._backbone import Fbank
from coeft.data._part import Part
from coeft.seeding import kept_generators, reseed

UNITS = {"full_scale": "a sine of full scale", "max": "the loudest moment of the clip"}
CLASSES, COLUMNS = 12, 4  # of a picture
CLIPS, DRAWS = 3, 3  # that augmentations are shown on, and how often


def show_sounds(built: Assembled, part: Part, class_names: list[str], seed: int, folder: Path) -> None:
    """Write spectrograms.png and, with augmentations, augmentations.png.

    Args:
        part: training clips, of which the first of each class is shown.
        seed: that the augmentations shown are drawn from.
    """
    front = cast(Any, built.module.prepare).front
    features = front.settings
    kaldi = isinstance(features, Fbank)
    look = plots.Spectrograms(
        centres=front.centres,
        frame_rate=front.frame_rate,
        unit="log energy" if kaldi else f"dB, 0 is {UNITS[features.reference]}",
        low=None if kaldi else features.low,
        high=None if kaldi else features.high,
    )
    classes, first = np.unique(part.labels, return_index=True)
    shown = [(class_names[label], int(row)) for label, row in zip(classes, first, strict=True)][:CLASSES]
    sound = part.batch([row for _, row in shown])["sound"]
    clean = _spectrograms(front, sound)
    titled = [(f"{name}: {Path(part.names[row]).name}", clean[place]) for place, (name, row) in enumerate(shown)]
    rows = [titled[start : start + COLUMNS] for start in range(0, len(titled), COLUMNS)]
    plots.spectrograms(rows, look, folder / "spectrograms.png")
    augment = built.module.augment
    if augment is None:
        return
    rows = [[titled[place]] for place in range(min(CLIPS, len(titled)))]
    before = augment.training
    with kept_generators(), torch.no_grad():
        reseed(seed, "picture")
        augment.train()
        for draw in range(DRAWS):
            changed = augment(sound[: len(rows)]).numpy()
            for place, row in enumerate(rows):
                row.append((f"augmented, draw {draw + 1}", changed[place]))
    augment.train(before)
    plots.spectrograms(rows, look, folder / "augmentations.png")


def _spectrograms(front: Any, sound: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        made: np.ndarray = (front(sound) if sound.dim() == 2 else sound).numpy()
    return made
