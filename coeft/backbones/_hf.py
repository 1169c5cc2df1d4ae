"""Building transformers models, and the facts of those that are already built."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto as auto

from coeft.attention.hf import find_sites
from coeft.attention.site import AttentionSite
from coeft.backbones import _hf_files as files
from coeft.backbones._backbone import Backbone
from coeft.backbones._hf_images import checked_size, preprocessing, way_to_size
from coeft.backbones._hf_sound import check_features, fbank, takes_sound
from coeft.backbones._hf_source import Source, find_source
from coeft.config import shorten_home
from coeft.errors import UserError
from coeft.seeding import reseed

if TYPE_CHECKING:
    from coeft.backbones.hf import HF

log = logging.getLogger("coeft")

# what transformers calls the classifier of ...ForSequenceClassification, ...ForImageClassification and their like
HEADS = ("classifier", "score", "classification_head")
# of a batch, what a model's forward takes but coeft's losses look after
NOT_INPUTS = ("labels", "return_loss")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class HFBackbone(Backbone):
    """A transformers model. `head` is "" where it has no classifier, as a causal language model has none."""

    kind: str = "hf"
    modality: str = "text"
    drawn: tuple[str, ...] = ()
    """Further modules between the blocks and the classifier that the weights did not hold, such as a pooler: drawn,
    trained and stored with the head."""
    image_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the forward for images."""

    @property
    def heads(self) -> list[str]:
        """The classifier, and what is drawn with it."""
        return [*super().heads, *self.drawn]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of a batch: (B, num_outputs) of a classifier, (B, T, vocabulary) of a language model.

        Keys that the model does not take, such as labels, or token_type_ids of models without segments, are left out.
        Where a causal model is given a mask, positions count the tokens that it shows, so that padding on the left
        and on the right give the same.
        """
        model = cast(Any, self.model)
        takes = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {key: v for key, v in batch.items() if key in takes and key not in NOT_INPUTS}
        if "pixel_values" in inputs:
            inputs |= {"pixel_values": inputs["pixel_values"].to(model.dtype)} | self.image_options
        if "input_values" in inputs:
            inputs["input_values"] = inputs["input_values"].to(model.dtype)
        if self._is_causal and "position_ids" in takes and "position_ids" not in inputs and "attention_mask" in inputs:
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in takes:
            inputs["use_cache"] = False
        output = model(**inputs)
        logits: Tensor = output["logits"] if "logits" in output else output[0]
        return logits

    @property
    def _is_causal(self) -> bool:
        return self.modality == "text" and _causal(cast(Any, self.model).config)

    def new_head(self, num_outputs: int, seed: int) -> None:
        """Replace the classifier by one with so many outputs, in fp32, drawn as the model's own code draws it.

        Raises:
            UserError: the model has no classifier.
        """
        model = cast(Any, self.model)
        if not self.head:
            raise UserError(f"{self.name} ({type(model).__name__}) has no classifier, not for {num_outputs} either")
        device = next(model.parameters()).device
        config = copy.deepcopy(model.config)
        config.num_labels = num_outputs
        with torch.device("meta"):
            fresh = type(model)(config)
        reseed(seed, "head")
        heads = [fresh.get_submodule(name).float().to_empty(device="cpu") for name in self.heads]
        with torch.no_grad():
            for parameter in (p for head in heads for p in head.parameters()):
                parameter.fill_(torch.nan)
            for module in [*(m for head in heads for m in head.modules()), fresh]:
                module._is_hf_initialized = False
                fresh._init_weights(module)
        for name, head in zip(self.heads, heads, strict=True):
            if any(bool(parameter.isnan().any()) for parameter in head.parameters()):
                raise RuntimeError(f"{type(model).__name__}._init_weights leaves {name} without values")
            head.register_forward_pre_hook(_in_own_type)
            model.set_submodule(name, head.to(device).train(model.training))
        model.config.num_labels = num_outputs  # and with it id2label and label2id
        if hasattr(model, "num_labels"):
            model.num_labels = num_outputs


def _in_own_type(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a head: its inputs in its type, fp32, whatever the model before it computes in."""
    own = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    return tuple(a.to(own) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def build(settings: HF, num_classes: int, seed: int, image_size: int | Sequence[int] | None, head: str) -> HFBackbone:
    """See HF.build."""
    size = checked_size(image_size)
    quantization = _quantization(settings)
    source = find_source(settings)
    with files.reading_once() if source.gguf else contextlib.nullcontext():
        model, drawn = _model(settings, source, num_classes, seed, head, quantization)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"backbone.gradient_checkpointing: {type(model).__name__} has no way to do it")
        # reentrant checkpoints would give no gradients behind frozen embeddings
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # 5.23 renames
        enable({"use_reentrant": False})
    backbone = describe(model, name=shorten_home(settings.name))  # it is written into adapters
    backbone.drawn = drawn
    if backbone.modality == "image":
        backbone.preprocessing = preprocessing(model, source.folder, size)
        backbone.image_options = way_to_size(model, settings.name, size)
    elif backbone.modality == "audio":
        backbone.fbank = fbank(model, source.folder)
    else:
        backbone.tokenizer = files.load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
        _agree_on_padding(model, backbone.tokenizer, settings.name)
    if head == "classifier":
        if not backbone.head:
            raise UserError(f"backbone: coeft does not know the classifier of {type(model).__name__}")
        if num_classes:
            backbone.new_head(num_classes, seed)
    model.train()  # transformers loads in eval mode, and Lightning would leave it there: no dropout in training
    return backbone


def _model(
    settings: HF, source: Source, num_classes: int, seed: int, head: str, quantization: Any
) -> tuple[Any, tuple[str, ...]]:
    """The model with its weights, in eval mode, and the modules to be drawn with its classifier."""
    config = files.load_config(source, settings.options, trust_remote_code=settings.trust_remote_code)
    config.gradient_checkpointing = False  # as the settings say
    loader = _loader(config, head, settings)
    if head == "classifier":
        config.num_labels = num_classes or 1
    dtype = _dtype(settings.dtype)
    model_class = _class(loader, config, settings, source)
    reseed(seed, "backbone")
    if not settings.pretrained:
        with files.quiet():
            return model_class._from_config(config, dtype=dtype).eval(), ()
    if quantization is not None and source.gguf is not None:
        raise UserError("backbone.quantization: the weights of a GGUF file are quantised already; leave it out")
    return _load(model_class, source, config, dtype, quantization, trust_remote_code=settings.trust_remote_code)


def describe(
    model: nn.Module,
    *,
    name: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    drawn: Sequence[str] = (),
) -> HFBackbone:
    """The facts of a transformers model that is already built.

    Runs one small forward, see coeft.attention.hf.find_sites.

    Args:
        name: as the user gave it; null is what the model was loaded from, else its class.
        inputs: keyword arguments of that forward, where coeft's own do not fit the model.
        drawn: modules besides the classifier that belong to the task.

    Raises:
        UserError: the model is not one of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is not a model of transformers")
    sites, refusal = find_sites(model, inputs)
    takes = inspect.signature(model.forward).parameters
    modality = "image" if "pixel_values" in takes and "input_ids" not in takes else "text"
    modality = "audio" if takes_sound(model) else modality
    return HFBackbone(
        name=name or model.config._name_or_path or type(model).__name__,
        model=model,
        sites=sites,
        refusal=refusal,
        blocks=block_names(model, sites),
        head=head_name(model),
        modality=modality,
        drawn=tuple(drawn),
    )


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[name]


def _quantization(settings: HF) -> Any:
    """transformers' config of the quantisation, None without.

    Raises:
        UserError: what it needs is not there.
    """
    if settings.quantization is None:
        return None
    where = f"backbone.quantization={settings.quantization}"
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{where} needs the package bitsandbytes: pip install bitsandbytes")
    if not torch.cuda.is_available():
        raise UserError(f"{where} needs a CUDA device, and there is none; leave it out")
    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*HEADS, "lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
        llm_int8_skip_modules=[*HEADS, "lm_head"],
    )


def _loader(config: Any, head: str, settings: HF) -> Any:
    """The class of transformers that picks the model's class.

    Raises:
        UserError: transformers has no such head for the model.
    """
    kind = type(config)
    own = (getattr(config, "auto_map", None) or {}) if settings.trust_remote_code else {}
    if head == "lm":
        if "AutoModelForCausalLM" in own or _causal(config):
            return AutoModelForCausalLM
        masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING
        why = "it reads texts in both directions" if masked else "transformers has none of this type"
        raise UserError(
            f"backbone: {settings.name} ({config.model_type}) is no causal language model: {why}; "
            "take another backbone, or a task that classifies"
        )
    if head != "classifier":
        raise ValueError(f"head must be classifier or lm, not {head!r}")
    for loader, mapping in (
        (AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        (AutoModelForImageClassification, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
        (AutoModelForAudioClassification, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING),
    ):
        if loader.__name__ in own or kind in mapping:
            if loader is AutoModelForAudioClassification:
                check_features(config, settings.name)
            return loader
    raise UserError(
        f"backbone: transformers has no classifier of texts, images or sound for {settings.name} ({config.model_type})"
    )


def _causal(config: Any) -> bool:
    """Whether models of this type see a text from left to right; BERT and its like have causal classes, but are not."""
    kind = type(config)
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING


def _class(loader: Any, config: Any, settings: HF, source: Source) -> Any:
    """The model's class, tried on the meta device (no memory, no draws) so that mistakes show early."""
    try:
        with files.quiet(), torch.device("meta"):
            arguments = {"trust_remote_code": True} if settings.trust_remote_code else {}
            return type(loader.from_config(copy.deepcopy(config), **arguments))
    except Exception as error:  # models check their configs, each in its own way
        given = ", ".join(f"{key}={value}" for key, value in settings.options.items())
        raise UserError(
            f"backbone: transformers cannot build {config.model_type} from {source.where}"
            f"{f' with {given}' if given else ''}: {_first(error)}"
        ) from None


def _load(
    model_class: Any, source: Source, config: Any, dtype: torch.dtype, quantization: Any, *, trust_remote_code: bool
) -> tuple[Any, tuple[str, ...]]:
    """The model with every weight from its files but the head's, and the modules that are drawn with the head.

    Raises:
        UserError: a file is missing or damaged, or does not hold what the model needs.
    """
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, with their names
        "local_files_only": True,
    }
    where: str | None = str(source.folder)
    if source.gguf is not None:
        where = str(source.gguf.parent)
        arguments |= {"gguf_file": source.gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    elif source.file is not None:
        where, arguments["state_dict"] = None, _tensors(source.file)
    if quantization is not None:
        arguments |= {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
    try:
        with files.quiet():
            # model_class is known: what code comes with the model has been decided
            model, info = model_class.from_pretrained(where, trust_remote_code=trust_remote_code, **arguments)
    except Exception as error:  # readers of safetensors, pickles and GGUF fail in their own ways
        if "weights_only" in str(error) or type(error).__name__ == "UnpicklingError":
            raise UserError(
                f"backbone: a weight file of {source.where} holds more than tensors, and coeft runs no code from "
                f"weight files; save the model as safetensors"
            ) from None
        raise UserError(f"backbone: the weights of {source.where} cannot be read: {_first(error)}") from None
    return model, _check_weights(model, info, source)


def _tensors(path: Any) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"backbone.weights: {path} is no whole safetensors file: {error}") from None


def _check_weights(model: Any, info: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """Modules, besides the classifier, that the weights do not hold and that are drawn with it.

    A module is only drawn if none of its weights is there and it lies outside of the embeddings and blocks: a pooler,
    or a dense layer before the classifier.

    Raises:
        UserError: names the weights that are missing, unexpected or of another shape.
    """
    head = head_name(model)
    base = model.base_model_prefix if model.base_model is not model else ""
    missing = [key for key in sorted(info["missing_keys"]) if not key.startswith(f"{head}." if head else "\0")]
    mismatched = {key: (list(got), list(own)) for key, got, own in info["mismatched_keys"]}
    others: dict[str, None] = {}
    wrong: list[str] = []
    for key in missing:
        owner = _part(key, base)
        every = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters()} if owner else set()
        if owner and every and every <= set(missing) and (not key.startswith(f"{base}.") or "pooler" in owner):
            others.setdefault(owner)
        else:
            wrong.append(f"{key} is missing")
    dropped = []
    for key in sorted(info["unexpected_keys"]):
        if head and key.startswith(f"{head}."):
            dropped.append(key)
        elif _known_part(model, key) or (base and _known_part(model.base_model, key)):
            wrong.append(f"{key} is unexpected")
        else:
            dropped.append(key)
    for key, (got, own) in sorted(mismatched.items()):
        if not (head and key.startswith(f"{head}.")):
            wrong.append(f"{key} is {got}, not {own}")
    wrong += [str(message) for message in info.get("error_msgs") or []]
    if wrong:
        listed = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise UserError(f"backbone: the weights of {source.where} do not fit {type(model).__name__}: {listed}")
    held = head and not any(key.startswith(f"{head}.") for key in info["missing_keys"])
    if held:
        log.warning("%s: its classifier (%s) is dropped; the task gets a fresh one", source.where, head)
    if dropped:
        parts = sorted({_part(key, base) or key for key in dropped})
        log.info("%s: not used by %s: %s", source.where, type(model).__name__, ", ".join(parts))
    if others:
        log.info("%s has no weights of %s: drawn and trained with the head", source.where, ", ".join(others))
    return tuple(others)


def _part(key: str, base: str) -> str:
    """The part of the model that a parameter belongs to: a child of the model, or of its base."""
    inside = f"{base}." if base and key.startswith(f"{base}.") else ""
    child, dot, _ = key.removeprefix(inside).partition(".")
    return f"{inside}{child}" if dot else ""


def _known_part(model: nn.Module, key: str) -> bool:
    """Whether a key lies in a part that the model has, other than the base model as a whole."""
    names = key.split(".")
    base = getattr(model, "base_model_prefix", "")
    if len(names) > 2 and names[0] == base:
        names = names[1:]
        model = getattr(model, base, model)
    return len(names) > 1 and names[0] in dict(model.named_children())


def _agree_on_padding(model: Any, tokenizer: Any, name: str) -> None:
    """Let the model know the token that pads, by which classifiers of causal models find the last token of a text."""
    if tokenizer is None:
        return
    text = model.config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int) and tokenizer.pad_token_id >= vocabulary:
        raise UserError(
            f"backbone: the padding token of {name}'s tokenizer is {tokenizer.pad_token_id}, "
            f"but the model knows {vocabulary} tokens"
        )
    for config in (model.config, text):
        config.pad_token_id = tokenizer.pad_token_id


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def head_name(model: nn.Module) -> str:
    """Module name of the classifier, "" where there is none."""
    children = dict(model.named_children())
    return next((name for name in HEADS if children.get(name) is not None), "")


def block_names(model: nn.Module, sites: Sequence[AttentionSite]) -> list[str]:
    """Names of the transformer blocks that hold the sites, in the order of the forward.

    A block is what transformers checkpoints as one (GradientCheckpointingLayer), the nearest around a site; else the
    outermost entry of a ModuleList around it. Without sites, every such layer.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    if not sites:
        return blocks
    entries = [
        f"{name}.{child}" for name, m in model.named_modules() if isinstance(m, nn.ModuleList) for child in m._modules
    ]
    found: dict[str, None] = {}
    for site in sites:
        around = [name for name in blocks if site.name.startswith(f"{name}.")]
        outer = [name for name in entries if site.name.startswith(f"{name}.")]
        found.setdefault(max(around, key=len, default=min(outer, key=len, default=site.name)))
    return list(found)
