"""The portable adapter: a folder of safetensors and JSON, laid out so that stock peft loads its LoRA part.

Nothing here runs code from a file. The layout and its promises stand in docs/adapter-format.md.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coeft.adapt import Stack, copy_into
from coeft.backbones._backbone import Backbone
from coeft.config import method_settings, to_dict
from coeft.errors import UserError
from coeft.faults import of_the_disk
from coeft.run import read_json, versions, write_json, write_text
from coeft.stored import is_count, is_number

FORMAT = 1
STOCK = ("LORA",)  # peft_type that stock peft loads; it goes to the top of the folder
SAMPLE = 32  # values of each tensor that the fingerprint reads


def fingerprint(model: nn.Module, head: str | Sequence[str]) -> dict[str, Any]:
    """Names and shapes of a base model's parameters, and a hash over a fixed sample of their values as bf16.

    Leaves out the head, position embeddings (they follow the image size) and integer (quantised) weights.

    Args:
        head: name of the module that is the head, or of several.
    """
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    shapes, digest = {}, hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(heads) or "pos_embed" in name or not parameter.is_floating_point():
            continue
        shapes[name] = list(parameter.shape)
        flat = parameter.detach().flatten()
        if flat.numel():
            at = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
            digest.update(flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return {"parameters": shapes, "sample_sha256": digest.hexdigest()}


def check_base(expected: Mapping[str, Any], actual: Mapping[str, Any], where: str) -> None:
    """Refuse a base model that is not the one an adapter was made for.

    Raises:
        UserError: names the parameters that are missing, unexpected or of another shape, or says that values differ.
    """
    want, have = expected["parameters"], actual["parameters"]
    wrong = [f"the model lacks {name}" for name in want if name not in have]
    wrong += [f"the model has {name} besides" for name in have if name not in want]
    wrong += [
        f"{name} is {have[name]}, not {shape}" for name, shape in want.items() if name in have and have[name] != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where} was made for another base model: {'; '.join(wrong[:4])}{more}")
    if expected["sample_sha256"] != actual["sample_sha256"]:
        raise UserError(
            f"{where} was made for a base model with the same shapes but other weights: load those it was trained on "
            "(coeft.json names them), or pass check=False if you know better"
        )


def save_adapter(
    path: Path,
    backbone: Backbone,
    stack: Stack,
    *,
    base: Mapping[str, Any],
    num_outputs: int,
    class_names: list[str],
    card: str,
) -> None:
    """Write the adapter of an attached stack to `path`; the folder appears only when it is complete.

    Args:
        base: fingerprint(model) from before the stack was attached.
        num_outputs: width of the head; 0 is none.
        card: the text of README.md.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        parts = {attachment.method: attachment.pack() for attachment in stack.attachments}
        stock = [method for method, (config, _) in parts.items() if config["peft_type"] in STOCK][:1]
        others = [method for method in parts if method not in stock]
        for method, (config, tensors) in parts.items():
            folder = part if method in stock else part / method
            folder.mkdir(exist_ok=True)
            if method in stock and others:
                config = {**config, "other_parts_need_coeft": others}
            write_json(folder / "adapter_config.json", dict(sorted(config.items())))
            write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        head = dict(backbone.head_parameters())
        if head:
            names = json.dumps(class_names, ensure_ascii=False)
            write_tensors(part / "head.safetensors", head, {"class_names": names})
        write_json(
            part / "coeft.json",
            {
                "format": FORMAT,
                "outputs": num_outputs,
                **({"scale": list(backbone.scale)} if backbone.scale else {}),
                "stack": [{"name": name, **asdict(settings)} for name, settings in stack.methods.items()],
                "base_model": {
                    "kind": backbone.kind,
                    "name": backbone.name,
                    "preprocessing": asdict(backbone.preprocessing) if backbone.preprocessing else None,
                    **({"hearing": asdict(backbone.hearing)} if backbone.hearing else {}),
                    **base,
                },
                "versions": versions(),
            },
        )
        write_text(part / "README.md", card)
        if path.exists():
            shutil.rmtree(path)
        part.chmod(0o755)
        part.replace(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read, as the umask allows.

    Args:
        metadata: one entry at most: safetensors writes several in an order that differs from process to process.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(plain, path, metadata=metadata)
    except SafetensorError as error:
        if (disk := of_the_disk(error)) is None:
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from error
    path.chmod(mode)  # safetensors makes it readable by its owner alone


def read_manifest(path: Path) -> dict[str, Any]:
    """coeft.json of an adapter, checked for what the rest relies on.

    Raises:
        UserError: there is no adapter, or it is not one this version reads.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter folder")
    if not (path / "coeft.json").is_file():
        hint = "; it is a run directory: take its adapter/ or a fold's" if (path / "config.yaml").exists() else ""
        raise UserError(f"{path} is not an adapter of coeft: it has no coeft.json{hint}")
    manifest = read_json(path / "coeft.json")
    where = f"{path}/coeft.json"
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{where}: 'format' must be {FORMAT}")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{where}: format {manifest['format']} is newer than this coeft reads ({FORMAT}); upgrade coeft"
        )
    base = manifest.get("base_model")
    if not isinstance(manifest.get("stack"), list) or not isinstance(base, dict):
        raise UserError(f"{where}: 'stack' must be a list and 'base_model' a mapping")
    shapes = base.get("parameters")
    if not isinstance(base.get("sample_sha256"), str) or not isinstance(shapes, dict):
        raise UserError(f"{where}: 'base_model' must hold 'parameters' and 'sample_sha256'")
    return manifest


def read_stack(manifest: Mapping[str, Any], where: str) -> Stack:
    """The stack that a manifest describes, every setting checked."""
    methods = {}
    for settings in manifest["stack"]:
        if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
            raise UserError(f"{where}: every member of 'stack' must be a mapping with a 'kind'")
        name = settings.get("name", settings["kind"])  # adapters from before names had the kind alone
        if not isinstance(name, str) or name in methods:
            raise UserError(f"{where}: every member of 'stack' must have a 'name' of its own, not {name!r}")
        own = {key: value for key, value in settings.items() if key != "name"}
        methods[name] = method_settings(name, own, where)
    return Stack(methods)


def check_stack(manifest: Mapping[str, Any], peft: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter whose stack is not the one that a run was trained with.

    Raises:
        UserError: names what differs, or what of the adapter's settings is wrong by itself.
    """
    ours = {name: to_dict(settings) for name, settings in peft.items()}
    if any("_target_" in settings for settings in ours.values()):  # a user's own are not checked
        return
    where = f"{path}/coeft.json"
    methods = read_stack(manifest, where).methods
    theirs = {name: to_dict(settings) for name, settings in methods.items()}  # with defaults that came later
    if list(theirs) != list(ours):
        raise UserError(
            f"{where}: the stack is [{', '.join(theirs)}], but the run was trained with [{', '.join(ours)}]"
        )
    wrong = [
        f"{name}.{key} is {theirs[name].get(key)!r}, not {value!r}"
        for name, own in ours.items()
        for key, value in own.items()
        if theirs[name].get(key) != value
    ]
    if wrong:
        raise UserError(f"{where} does not fit the config of the run: {'; '.join(wrong[:4])}")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def read_class_names(path: Path) -> list[str]:
    """The class names of an adapter's head, in the order of its logits; none where there is no head."""
    if not (path / "head.safetensors").exists():
        return []
    _, metadata = read_tensors(path / "head.safetensors")
    try:
        names = json.loads(metadata["class_names"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}/head.safetensors: its metadata must hold class_names as JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}/head.safetensors: class_names must be a list of texts")
    return names


def outputs(manifest: Mapping[str, Any], class_names: list[str], path: Path) -> int:
    """Width of the head that an adapter was trained with; 0 is none. Older adapters say it by their class names alone.

    Raises:
        UserError: neither says it, or they and the tensors of the head at `path` disagree.
    """
    count = manifest.get("outputs", len(class_names) or None)
    if not is_count(count):
        raise UserError(f"{path}/coeft.json: 'outputs' must be a number of outputs, not {count!r}")
    if not count:
        return 0
    file = path / "head.safetensors"
    tensors, _ = read_tensors(file)
    widths = sorted({len(tensor) for tensor in tensors.values() if tensor.dim()})
    if count not in widths or (class_names and len(class_names) != count):
        named = f" and names {len(class_names)} classes" if class_names else ""
        raise UserError(
            f"{path}/coeft.json: 'outputs' is {count}, but {file.name} has {' or '.join(map(str, widths)) or 'no'} "
            f"outputs{named}: one of the two is of another adapter"
        )
    return count


def fill(path: Path, backbone: Backbone, stack: Stack) -> None:
    """Load the weights of an adapter into a model that its stack is attached to, and into its head.

    Raises:
        UserError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    for attachment in stack.attachments:
        nested = path / attachment.method
        folder = nested if nested.is_dir() else path
        config = read_json(folder / "adapter_config.json")
        if not isinstance(config, dict):
            raise UserError(f"{folder}/adapter_config.json must be a mapping")
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
        try:
            attachment.unpack(config, tensors)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    if head := backbone.head_parameters():
        tensors, _ = read_tensors(path / "head.safetensors")
        copy_into(head, tensors, f"{path}/head.safetensors")
        if scale := _scale(path):
            backbone.rescale_head(*scale)


def _scale(path: Path) -> tuple[float, float] | None:
    """Mean and deviation that an adapter's head is scaled by, None for none."""
    scale = read_json(path / "coeft.json").get("scale")
    if scale is None:
        return None
    if not isinstance(scale, list) or len(scale) != 2 or not all(map(is_number, scale)):
        raise UserError(f"{path}/coeft.json: 'scale' must be a list of two numbers, not {scale!r}")
    mean, deviation = map(float, scale)
    if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
        raise UserError(f"{path}/coeft.json: 'scale' must be a finite mean and a positive deviation, not {scale!r}")
    return mean, deviation


def load_adapter(model: nn.Module, path: str | Path, *, check: bool = True) -> nn.Module:
    """Restore an adapter on its base model, in place: every method of the stack, and the head.

    Args:
        model: the pre-trained model the adapter was trained on, as timm builds it or transformers loads it. Its head
            may have any number of outputs; it is replaced by the adapter's.
        path: an adapter folder, as `coeft export adapter` writes it.
        check: refuse a base model whose names, shapes or weights differ from those it was trained on.

    Returns:
        The same model, in evaluation mode.

    Raises:
        UserError: the folder is no adapter, is damaged, or does not fit the model.
    """
    path = Path(path).expanduser()
    backbone, stack = open_adapter(model, path, check=check)
    stack.attach(backbone, seed=0)
    fill(path, backbone, stack)
    return model.eval()


def open_adapter(model: nn.Module, path: Path, *, check: bool) -> tuple[Backbone, Stack]:
    """The facts of a base model, with a head for the adapter's classes, and the adapter's stack, not yet attached.

    Raises:
        UserError: as load_adapter.
    """
    manifest = read_manifest(path)
    stack = read_stack(manifest, f"{path}/coeft.json")
    num_outputs = outputs(manifest, read_class_names(path), path)
    backbone = describe(model, manifest["base_model"].get("kind"), path)
    if check:
        check_base(manifest["base_model"], fingerprint(model, backbone.heads), str(path))
    if backbone.kind == "timm":
        model.reset_classifier(num_outputs)  # type: ignore[operator]
    elif backbone.head and num_outputs:
        backbone.new_head(num_outputs, 0)
    return backbone, stack


def describe(model: nn.Module, kind: Any, path: Path | None = None) -> Backbone:
    """The facts of a model of a backbone's kind, and with an adapter's folder the modules that its head holds."""
    if kind == "hf":
        from coeft.backbones._hf import describe as describe_hf
        from coeft.backbones._hf import head_name

        file = (path or Path()) / "head.safetensors"
        stored = read_tensors(file)[0] if path and file.exists() else {}
        own = {name.rpartition(".")[0] for name in stored if not name.startswith(f"{head_name(model)}.")}
        modules = dict(model.named_modules())
        if strays := sorted(own - set(modules)):
            raise UserError(f"{file}: the model has no {', '.join(strays)}")
        return describe_hf(model, drawn=sorted(own))
    from coeft.backbones._timm import describe as describe_timm

    return describe_timm(model)
