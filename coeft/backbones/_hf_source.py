"""Finding the files of a transformers model: in a folder, in the hub's cache, on the hub. Imports no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from coeft.backbones._network import NETWORK_SECONDS, in_time
from coeft.errors import UserError

if TYPE_CHECKING:
    from coeft.backbones.hf import HF

log = logging.getLogger("coeft")

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where there is none of the first
SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, chat template, image processor


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of one model, all on this machine."""

    name: str
    """As the user gave it."""
    folder: Path | None
    """Holds config.json; null where everything is in `gguf`."""
    file: Path | None = None
    """Weights in a safetensors file of their own."""
    gguf: Path | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.gguf or self.file or self.folder)


def find_source(settings: HF) -> Source:
    """The files that the settings name, fetched from the hub where there is no copy on this machine.

    Raises:
        UserError: there is no such file or folder, or neither a cached copy nor a network.
    """
    name, revision = settings.name, settings.revision
    needs = {"weights": settings.pretrained, "code": settings.trust_remote_code}
    if settings.weights is None:
        if name.endswith(".gguf") and Path(name).expanduser().is_file():
            return Source(name=name, folder=None, gguf=_checked_gguf(Path(name).expanduser()))
        return Source(name=name, folder=_folder(name, revision, **needs))
    path = Path(settings.weights).expanduser()
    if path.is_dir():
        return Source(name=name, folder=_checked(path, "backbone.weights"))
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file or folder {settings.weights}")
    if path.suffix == ".gguf":
        return Source(name=name, folder=None, gguf=_checked_gguf(path))
    if path.suffix != ".safetensors":
        raise UserError(
            f"backbone.weights: {path} is neither a folder, a .gguf nor a .safetensors file; "
            "other formats can hold code, and are not read"
        )
    beside = (path.parent / CONFIG).is_file()
    needs["weights"] = False
    return Source(name=name, folder=path.parent if beside else _folder(name, revision, **needs), file=path)


def _folder(name: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """The folder of a model: a local one, or the snapshot of a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path, "backbone.name")
    if path.is_file():
        raise UserError(f"backbone.name: {name} is a file; give weights by backbone.weights=FILE")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise UserError(f"backbone.name: there is no folder {name}")
    return _snapshot(name, revision, weights=weights, code=code)


def _checked(folder: Path, key: str) -> Path:
    if (folder / "adapter_config.json").is_file() or (folder / "coeft.json").is_file():
        raise UserError(
            f"{key}: {folder} holds an adapter, not a model; name its base model, and the adapter by init_from="
        )
    if (folder / CONFIG).is_file():
        return folder
    held = sorted(file.name for file in folder.glob("*.gguf"))
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    hint = f"; name the file in it: backbone.weights={folder / held[0]}" if held else ""
    hint = hint or (f"; one of its folders may be meant: {', '.join(inner)}" if inner else "")
    raise UserError(f"{key}: {folder} has no {CONFIG}, so that it is no model of transformers{hint}")


def _offline(name: str, reason: str) -> UserError:
    return UserError(
        f"backbone.name: {name} is no folder here, is not in the Hugging Face cache, and cannot be fetched ({reason}). "
        "Either give a local copy, backbone.weights=FOLDER (config.json, tokenizer, safetensors) or a GGUF file, or "
        "fill the cache: run once with a network, or copy the cache of a machine that has one and point HF_HOME at it"
    )


def _snapshot(name: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """The folder of a hub id in the cache, fetched if needed.

    Raises:
        UserError: no such model, no right to read it, or neither a cached copy nor a network.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = constants.HF_HUB_CACHE
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, cache_dir=cache))
        if (cached / CONFIG).is_file() and (not weights or any(any(cached.glob(mask)) for mask in WEIGHTS)):
            return cached
    except HFValidationError as error:
        raise UserError(f"backbone.name: {name!r} is neither a folder nor a hub id OWNER/NAME: {error}") from None
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise _offline(name, "HF_HUB_OFFLINE is set")
    try:
        # Downloads retry for long: ask first, once, whether the hub answers.
        info = in_time(partial(HfApi().model_info, name, revision=revision, timeout=NETWORK_SECONDS))
    except GatedRepoError:
        raise UserError(
            f"backbone.name: {name} is gated: ask for access on its page, then `hf auth login`, or give a local copy "
            "by backbone.weights=FOLDER"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"backbone.revision: {name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"backbone.name: the Hugging Face hub has no model {name!r} (or it is private), and there is no such folder"
        ) from None
    except Exception as error:  # httpx, sockets, proxies, HTTP errors: each has its own
        raise _offline(name, str(error).splitlines()[0] if str(error) else repr(error)) from None
    masks = list(SMALL) + (["*.py"] if code else [])
    if weights:
        held = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
        masks.append(WEIGHTS[0] if any(file.endswith(".safetensors") for file in held) else WEIGHTS[1])
    log.info("downloading %s", name)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=masks,
            ignore_patterns=["*/*", "consolidated*"],
            cache_dir=cache,
        )
    except Exception as error:
        raise _offline(name, f"the download broke off: {error}") from None
    return _checked(Path(folder), "backbone.name")


def _checked_gguf(path: Path) -> Path:
    """Raises UserError when the package to read GGUF is missing, or the file is none."""
    if find_spec("gguf") is None:
        raise UserError(f"backbone.weights: {path} needs the package gguf: pip install 'coeft[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"backbone.weights: {path} is not a GGUF file: it does not begin with GGUF")
    return path
