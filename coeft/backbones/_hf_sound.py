"""What a transformers model of sound takes: from its feature extractor's config."""

from __future__ import annotations

import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

from coeft.backbones._backbone import Fbank
from coeft.errors import UserError

log = logging.getLogger("coeft")

AUDIOSET = {"sampling_rate": 16_000, "mean": -4.2677393, "std": 4.5689974}
"""What ASTFeatureExtractor has where nothing else is said."""
KNOWN = "audio-spectrogram-transformer"
"""The only type of transformers' models of sound that coeft has features for."""


def takes_sound(model: Any) -> bool:
    """Whether a model takes sound and nothing else."""
    takes = inspect.signature(model.forward).parameters
    return "input_values" in takes and "input_ids" not in takes and "pixel_values" not in takes


def check_features(config: Any, name: str) -> None:
    """Look whether coeft makes what a model of sound takes.

    Raises:
        UserError: it does not.
    """
    if config.model_type != KNOWN:
        raise UserError(
            f"backbone: {name} ({config.model_type}) takes sound in a form that coeft does not make; of transformers' "
            f"models of sound it knows the Audio Spectrogram Transformer ({KNOWN})"
        )


def fbank(model: Any, folder: Path | None) -> Fbank:
    """The features that a model takes, as the folder's preprocessor_config.json says, else as AudioSet's.

    Raises:
        UserError: the model takes other inputs than Kaldi's features, or the file says what coeft does not do.
    """
    config = model.config
    check_features(config, type(model).__name__)
    bands, frames = config.num_mel_bins, config.max_length
    path = None if folder is None else folder / "preprocessor_config.json"
    tree = dict(AUDIOSET)
    if path is not None and path.is_file():
        tree |= _read(path)
    elif folder is not None:
        log.info("%s has no preprocessor_config.json: rate, mean and standard deviation are those of AudioSet", folder)
    own = {"num_mel_bins": bands, "max_length": frames}
    for key, value in own.items():
        if tree.get(key, value) != value:
            raise UserError(f"{path}: {key} is {tree[key]}, but the model's config.json has {value}")
    rate, mean, std = tree["sampling_rate"], tree["mean"], tree["std"]
    if not isinstance(rate, int) or isinstance(rate, bool) or not 1000 <= rate <= 384_000:
        raise UserError(f"{path}: sampling_rate must be a whole number of Hz, 1,000 to 384,000, not {rate!r}")
    if tree.get("do_normalize", True) is not True:
        mean, std = 0.0, 0.5
    if not (_is_number(mean) and _is_number(std) and std > 0):
        raise UserError(f"{path}: mean and std must be numbers, std above 0, not {mean!r} and {std!r}")
    return Fbank(sample_rate=rate, bands=bands, frames=frames, mean=float(mean), std=float(std))


def extractor_config(features: Fbank) -> dict[str, Any]:
    """preprocessor_config.json for ASTFeatureExtractor of transformers."""
    return {
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "sampling_rate": features.sample_rate,
        "num_mel_bins": features.bands,
        "max_length": features.frames,
        "padding_value": 0.0,
        "do_normalize": True,
        "mean": features.mean,
        "std": features.std,
        "return_attention_mask": False,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(tree, dict)
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise UserError(f"{path}: not a mapping in JSON: {error}") from None
    return tree


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
