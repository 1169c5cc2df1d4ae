"""A model as files that plain timm or plain transformers loads, and the lines of code that do so."""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from coeft.adapter_io import write_tensors
from coeft.backbones._backbone import Backbone, Preprocessing
from coeft.backbones._hf_sound import extractor_config
from coeft.run import write_json

RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # numbers of PIL


def save(
    backbone: Backbone,
    folder: Path,
    *,
    without: Collection[str] = (),
    class_names: Sequence[str] = (),
    expanded: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, model.safetensors and what belongs to them into a folder.

    Args:
        without: names of parameters to leave out, those of methods that stay apart.
        class_names: of the logits, where they are classes.
        expanded: for timm, name of a layer -> arguments of its class, of layers that head expansion has rewritten.
    """
    state = {name: tensor for name, tensor in backbone.model.state_dict().items() if name not in without}
    if backbone.kind == "hf":
        _save_hf(backbone, folder, state, class_names)
    else:
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        _save_timm_config(backbone, folder, class_names, expanded)


def _save_timm_config(
    backbone: Backbone, folder: Path, class_names: Sequence[str], expanded: Mapping[str, Any] | None
) -> None:
    from timm.models._hub import save_config_for_hf

    look = backbone.preprocessing
    assert look is not None  # timm's models take images
    data = {
        "input_size": (len(look.mean), *look.image_size),
        "mean": look.mean,
        "std": look.std,
        "interpolation": look.interpolation,
        "crop_pct": look.crop_pct if look.resize == "crop" else 1.0,
        "crop_mode": "center" if look.resize == "crop" else "squash",
    }
    config: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
    if expanded:
        config["expanded_attention"] = dict(expanded)
    save_config_for_hf(cast(Any, backbone.model), str(folder / "config.json"), model_config=config, data_config=data)


def _save_hf(backbone: Backbone, folder: Path, state: dict[str, torch.Tensor], class_names: Sequence[str]) -> None:
    model, head = cast(Any, backbone.model), backbone.head_parameters()
    if class_names and len(class_names) == getattr(model.config, "num_labels", None):
        model.config.id2label = dict(enumerate(class_names))
        model.config.label2id = {name: number for number, name in enumerate(class_names)}
    # one type for all: a head that was trained in float32 over a body of half precision has no plain form
    state = {name: tensor.to(model.dtype) if name in head else tensor for name, tensor in state.items()}
    with _quiet():
        model.save_pretrained(folder, state_dict=state)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(folder)
    if backbone.preprocessing is not None:
        write_json(folder / "preprocessor_config.json", _image_processor(backbone.preprocessing))
    if backbone.fbank is not None:
        write_json(folder / "preprocessor_config.json", extractor_config(backbone.fbank))
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # safetensors makes it readable by its owner alone


def _image_processor(look: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json for AutoImageProcessor of transformers."""
    height, width = look.image_size
    sides = {"height": height, "width": width}
    tree: dict[str, Any] = {
        "do_resize": True,
        "resample": RESAMPLING[look.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(look.mean),
        "image_std": list(look.std),
    }
    if look.resize == "squash":
        return tree | {"image_processor_type": "ViTImageProcessor", "size": sides}
    shorter = {"shortest_edge": int(min(height, width) / look.crop_pct)}
    crop = {"do_center_crop": True, "crop_size": sides}
    return tree | crop | {"image_processor_type": "BitImageProcessor", "size": shorter}


def load(like: Backbone, folder: Path, *, expanded: bool = False) -> nn.Module:
    """The model of a folder that `save` has written, by the lines that `loading_code` gives; in eval mode."""
    if like.kind == "hf":
        with _quiet():
            return type(cast(Any, like.model)).from_pretrained(folder).eval()
    if expanded:
        from coeft.attention.expand_timm import load as load_expanded

        return load_expanded(str(folder))
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def loading_code(backbone: Backbone, *, expanded: bool = False, adapter: bool = False) -> str:
    """Lines that load a stand-alone folder, run inside of it.

    Args:
        expanded: layers have more heads than usual.
        adapter: the folder holds an adapter in adapter/, which needs coeft.
    """
    if backbone.kind == "hf":
        name = type(backbone.model).__name__
        lines = ["import transformers", "", f'model = transformers.{name}.from_pretrained(".")']
    elif expanded:
        from coeft.attention.expand_timm import load as load_expanded

        lines = [inspect.getsource(load_expanded), "", 'model = load(".")']
    else:
        lines = ["import timm", "", 'model = timm.create_model("local-dir:.", pretrained=True).eval()']
    if options := getattr(backbone, "image_options", None):
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        lines.append(f"# for images of this size: model(pixel_values=..., {given})")
    if adapter:
        lines = ["import coeft", *lines, 'model = coeft.load_adapter(model, "./adapter")']
    return "\n".join(lines)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
