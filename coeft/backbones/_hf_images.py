"""What images a transformers model wants: from its image processor's config, and at other sizes than its own."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from coeft.backbones._backbone import Preprocessing
from coeft.backbones._hf_files import quiet
from coeft.errors import UserError

log = logging.getLogger("coeft")

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # numbers of PIL


def preprocessing(model: Any, folder: Path | None, size: tuple[int, int] | None) -> Preprocessing:
    """What an image goes through: as the folder's preprocessor_config.json says, else as transformers' class has it.

    Args:
        size: height and width in pixels; null is the model's own.

    Raises:
        UserError: the file cannot be read, or says what coeft does not do.
    """
    own = _config_size(model.config)
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is not None and path.is_file():
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(tree, dict)
        except (OSError, ValueError, AssertionError, RecursionError) as error:
            raise UserError(f"{path}: not a mapping in JSON: {error}") from None
        where = str(path)
    else:
        tree, where = _defaults(model), f"{type(model).__name__}'s image processor"
        if own is not None:  # of the class: the model's own size may be another
            tree.update(size={"height": own[0], "width": own[1]}, do_center_crop=False)
        if folder is not None:
            log.info(
                "%s has no preprocessor_config.json: mean, standard deviation and interpolation of %s", folder, where
            )
    return from_processor(tree, where, own, size)


def from_processor(
    tree: dict[str, Any], where: str, own: tuple[int, int] | None, size: tuple[int, int] | None
) -> Preprocessing:
    """The facts in the config of an image processor of transformers.

    A size of one side (`shortest_edge`, or a number with a crop) is resized to and the centre is cropped; a size of
    height and width squashes the image.

    Args:
        own: height and width that the model's config names, used where the processor names none.
    """
    resize, crop_pct = "crop", 1.0
    edge, pair = _sides(tree.get("size"))
    side, crop = _sides(tree.get("crop_size"))
    crop = crop or ((side, side) if side else None)
    cropped = bool(tree.get("do_center_crop", crop is not None)) and crop is not None
    if edge is not None and pair is None and "crop_size" not in tree and not isinstance(tree.get("size"), dict):
        pair, edge = (edge, edge), None  # older files: one number for both sides, squashed
    target = crop if cropped else pair
    if edge is not None:
        target = target or (edge, edge)
        crop_pct = min(1.0, min(target) / edge)
        if not cropped and isinstance(tree.get("crop_pct"), float):  # ConvNeXt: size is that of the crop
            crop_pct = tree["crop_pct"]
    elif pair is not None:
        if cropped and crop != pair:
            log.warning("%s squashes to %s, then crops to %s; coeft resizes the shorter side", where, pair, crop)
            crop_pct = min(1.0, min(crop or pair) / min(pair))
        else:
            resize = "squash"
    target = target or own
    if size is None and target is None:
        raise UserError(f"{where} names no image size: set data.image_size")
    number = tree.get("resample", 2)
    if number not in RESAMPLING:
        raise UserError(f"{where}: resample {number} is none of {', '.join(map(str, RESAMPLING))} (numbers of PIL)")
    scale = tree.get("rescale_factor", 1 / 255)
    if tree.get("do_rescale", True) is not True or abs(scale * 255 - 1) > 1e-3:
        raise UserError(f"{where}: pixels must be scaled by 1/255, not by {scale}")
    normal = tree.get("do_normalize", True)
    mean, std = tree.get("image_mean"), tree.get("image_std")
    if normal and (not isinstance(mean, Sequence) or not isinstance(std, Sequence) or len(mean) != len(std)):
        raise UserError(f"{where}: image_mean and image_std must be lists of one number a channel")
    return Preprocessing(
        image_size=size or target or (0, 0),
        mean=tuple(mean) if normal and mean else (0.0, 0.0, 0.0),
        std=tuple(std) if normal and std else (1.0, 1.0, 1.0),
        interpolation=RESAMPLING[number],
        crop_pct=crop_pct,
        resize=resize,
    )


def _sides(value: Any) -> tuple[int | None, tuple[int, int] | None]:
    """Length of the shorter side, or height and width."""
    if isinstance(value, int):
        return value, None
    if isinstance(value, Sequence) and len(value) == 2:
        return None, (int(value[0]), int(value[1]))
    if isinstance(value, dict):
        if "height" in value and "width" in value:
            return None, (int(value["height"]), int(value["width"]))
        if value.get("shortest_edge"):
            return int(value["shortest_edge"]), None
    return None, None


def _defaults(model: Any) -> dict[str, Any]:
    """The config of the image processor that transformers has for a model."""
    try:
        found = IMAGE_PROCESSOR_MAPPING[type(model.config)]
        classes = list(found.values()) if isinstance(found, dict) else list(found)
        with quiet():
            return next(cls for cls in classes if cls is not None)().to_dict()
    except Exception:
        raise UserError(
            f"backbone: {type(model).__name__} comes without preprocessor_config.json, and transformers has no "
            "image processor for it: add that file to the model's folder"
        ) from None


def _config_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


def checked_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width in pixels; None stays None."""
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise UserError(f"data.image_size must be a number of pixels, or height and width, not {image_size!r}")
    return pair[0], pair[1]


def way_to_size(model: Any, name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """What the forward needs besides pixels to take images of a size; position embeddings are interpolated.

    Raises:
        UserError: the model takes no such images.
    """
    own = _config_size(model.config)
    if size is None or size == own:
        return {}
    vision = getattr(model.config, "vision_config", model.config)
    patch = getattr(vision, "patch_size", None)
    if isinstance(patch, int) and any(side % patch for side in size):
        raise UserError(
            f"data.image_size: {size[0]} x {size[1]} pixels are not a multiple of the patches of {name}, "
            f"{patch} x {patch}; the border would be lost"
        )
    pixels = torch.zeros(1, getattr(vision, "num_channels", 3), *size, dtype=model.dtype, device=model.device)
    ways: list[dict[str, Any]] = [{}, {"interpolate_pos_encoding": True}]
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        ways.reverse()
    training = model.training
    reason = ""
    try:
        model.eval()
        for way in ways:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    model(pixel_values=pixels, **way)
                return way
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        model.train(training)
    takes = f"images of {own[0]} x {own[1]} only" if own else "no images of that size"
    raise UserError(f"data.image_size: {name} takes {takes}, not {size[0]} x {size[1]} ({reason})")
