"""Images for a backbone: decoded and resized as its preprocessing says."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coeft.backbones._backbone import Preprocessing
from coeft.data._cache import decode
from coeft.data._folders import IMAGES, file_inputs
from coeft.data._part import Encoded, Progress
from coeft.data._settings import ImageData
from coeft.data._source import Split
from coeft.errors import UserError


@dataclass(frozen=True)
class ImageEncoder:
    """Files, encoded images or arrays to pixels in one size."""

    preprocessing: Preprocessing
    """As `resolve_preprocessing` gives it."""
    modality = "image"

    def encode(
        self,
        split: Split,
        *,
        made_from: str,
        on_error: str = "raise",
        threads: int = 0,
        keep: bool = True,
        progress: Progress = lambda done, total: None,
    ) -> Encoded:
        """See Encoder.encode."""
        height, width = self.preprocessing.image_size
        return decode(
            split,
            self.preprocessing,
            made_from=f"{made_from}, {height}x{width}",
            on_error=on_error,
            threads=threads,
            keep=keep,
            progress=progress,
        )


def resolve_preprocessing(settings: ImageData, backbone: Preprocessing) -> Preprocessing:
    """The backbone's preprocessing with what `data.*` sets in its place.

    Raises:
        UserError: the number of means or standard deviations is not that of the backbone's channels.
    """
    changes: dict[str, Any] = {}
    if settings.image_size is not None:
        changes["image_size"] = (settings.image_size, settings.image_size)
    for key in ("mean", "std"):
        values = getattr(settings, key)
        if values is None:
            continue
        if len(values) != len(backbone.mean):
            raise UserError(
                f"data.{key} has {len(values)} values, but the backbone takes {len(backbone.mean)} channels: "
                f"give {len(backbone.mean)} values, or null"
            )
        changes[key] = tuple(float(value) for value in values)
    for key in ("interpolation", "crop_pct", "resize"):
        if getattr(settings, key) is not None:
            changes[key] = getattr(settings, key)
    return replace(backbone, **changes)


def image_inputs(paths: Sequence[str | os.PathLike[str]]) -> Split:
    """Images to predict, see file_inputs."""
    return file_inputs(paths, IMAGES)
