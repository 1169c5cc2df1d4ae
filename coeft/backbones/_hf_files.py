"""Where a transformers model comes from: a folder, the hub's cache, the hub, a GGUF or a safetensors file."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from coeft.backbones._network import NETWORK_SECONDS, in_time
from coeft.errors import UserError, near

if TYPE_CHECKING:
    from coeft.backbones.hf import HF

log = logging.getLogger("coeft")

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where there is none of the first
SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, chat template, image processor
# a folder that holds none of these has no tokenizer; transformers would make an empty one up
VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "tekken.json",
)  # fmt: skip
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")


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
            return Source(name=name, folder=None, gguf=Path(name).expanduser())
        return Source(name=name, folder=_folder(name, revision, **needs))
    path = Path(settings.weights).expanduser()
    if path.is_dir():
        return Source(name=name, folder=_checked(path, "backbone.weights"))
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file or folder {settings.weights}")
    if path.suffix == ".gguf":
        return Source(name=name, folder=None, gguf=path)
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


def load_config(source: Source, options: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """The model's config with the user's options.

    Raises:
        UserError: it cannot be read, is of a type that transformers does not have, needs code that comes with it, or
            has no such option.
    """
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if source.gguf is not None:
        check_gguf(source.gguf)
        folder, arguments["gguf_file"] = source.gguf.parent, source.gguf.name
    else:
        assert source.folder is not None
        folder = source.folder
        _check_config(folder / CONFIG, trust_remote_code)
    try:
        with quiet():
            config, unused = AutoConfig.from_pretrained(str(folder), return_unused_kwargs=True, **arguments, **options)
    except Exception as error:  # configs check themselves, each in its own way; GGUF readers too
        given = f" with {', '.join(f'{key}={value}' for key, value in options.items())}" if options else ""
        raise UserError(f"backbone: the config of {source.where} cannot be read{given}: {_short(error)}") from None
    wrong = sorted(set(unused) & set(options))
    if wrong:
        known = [key for key in config.to_dict() if not key.startswith("_")]
        raise UserError(
            f"backbone.options: the config of {source.name} ({config.model_type}) has no {wrong[0]!r}; "
            f"{near(wrong[0], known)}"
        )
    return config


def _check_config(path: Path, trust_remote_code: bool) -> None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {_short(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a model's config is a mapping")
    kind, code = tree.get("model_type"), tree.get("auto_map")
    if kind in CONFIG_MAPPING_NAMES or (code and trust_remote_code):
        if code and trust_remote_code:
            log.warning("backbone.trust_remote_code=true: Python code that comes with %s may run", path.parent)
        return
    if code:
        raise UserError(
            f"{path}: the model brings Python code of its own ({', '.join(sorted(map(str, code)))}); read it, then "
            "allow it by backbone.trust_remote_code=true"
        )
    if not isinstance(kind, str):
        raise UserError(f"{path}: 'model_type' is missing, so that it is no config of a transformers model")
    raise UserError(
        f"{path}: transformers {transformers.__version__} has no model_type {kind!r}; "
        f"{near(kind, CONFIG_MAPPING_NAMES)}"
    )


def check_gguf(path: Path) -> None:
    """Raises UserError when the package to read GGUF is missing, or the file is none."""
    if find_spec("gguf") is None:
        raise UserError(f"backbone.weights: {path} needs the package gguf: pip install 'coeft[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"backbone.weights: {path} is not a GGUF file: it does not begin with GGUF")


def load_tokenizer(source: Source, *, trust_remote_code: bool) -> Any:
    """The tokenizer that comes with a model, with a padding token; None where there is none.

    Raises:
        UserError: it cannot be read, or has no token that can pad.
    """
    arguments: dict[str, Any] = {"local_files_only": True}
    try:
        with quiet():
            if source.gguf is not None:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    str(source.gguf.parent), gguf_file=source.gguf.name, **arguments
                )
            else:
                folder = _tokenizer_folder(source)
                if folder is None:
                    return None
                arguments["trust_remote_code"] = trust_remote_code
                tokenizer = AutoTokenizer.from_pretrained(str(folder), **arguments)
    except Exception as error:  # tokenizers, sentencepiece and the conversions between them fail in their own ways
        raise UserError(f"backbone: the tokenizer of {source.where} cannot be read: {_short(error)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"backbone: the tokenizer of {source.where} has neither a padding nor an end token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        log.info("%s: its tokenizer has no padding token; its end token %s pads", source.name, tokenizer.eos_token)
    return tokenizer


def _tokenizer_folder(source: Source) -> Path | None:
    named = Path(source.name).expanduser()
    for folder in (source.folder, named if named.is_dir() else None):
        if folder is None:
            continue
        if any((folder / file).is_file() for file in VOCABULARIES):
            return folder
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and any(name in settings.read_text(encoding="utf-8") for name in WITHOUT_VOCABULARY):
            return folder
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' own reports and progress bars, which coeft replaces by errors and lines of its log, kept back."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """transformers reads a GGUF file's header anew for the config and the weights, and the table of tensor names for
    every module, both many seconds; inside this context each is read once.
    """
    if find_spec("gguf") is None:
        yield
        return
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(before[0]), cache(before[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
