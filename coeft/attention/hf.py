"""How a mixer reaches the attention maps of transformers models.

transformers' attention classes hand query, key, value and mask to a function that is looked up by name
(AttentionInterface), and their models build masks by a function of the same name (AttentionMaskInterface). coeft
registers two names, one for each attention that a model may run before:

    coeft_eager, coeft_sdpa     a layer with a child `coeff_mix`: the model file's own eager_attention_forward gives
                                the maps (so softcap, sinks, position biases, scaling and dropout stay the model's),
                                which are mixed and multiplied with the values, or, where plain attention that would
                                run sdpa is large, the whole attention goes to the mixer (coeft/attention/hf_fused.py);
                                any other layer: eager or sdpa as before

No class is edited and no parameter of the model changes its name. Which layers a model has is found by a forward in
which every layer that asks the interface is noted; the tables below only give names and reasons. transformers says
nothing when a class does not ask, when masks are missing or when a name is switched away: these are errors here.
Read from transformers 5.23.
"""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from coeft.attention import hf_fused
from coeft.attention.mixer import CoeffMixer
from coeft.attention.site import BOTH_ROUTES, AttentionSite, drop_hooks
from coeft.errors import UserError
from coeft.modes import evaluating

log = logging.getLogger("coeft")

ROUTE = "maps (AttentionInterface)"
EAGER, SDPA, PROBE = "coeft_eager", "coeft_sdpa", "coeft_probe"
BEFORE = "attention_before_coeff"  # attribute of a model with mixers: its configs and what each ran before

# model_type -> (families, which attention layers there are, by their names). These have a small model in the tests.
TESTED = {
    "bert": ("BERT", "encoder"),
    "roberta": ("RoBERTa", "encoder"),
    "distilbert": ("DistilBERT", "encoder"),
    "modernbert": ("ModernBERT", "encoder; global and sliding-window layers"),
    "vit": ("ViT", "encoder"),
    "dinov2": ("DINOv2", "encoder"),
    "audio-spectrogram-transformer": ("AST (Audio Spectrogram Transformer)", "encoder"),
    "siglip": ("SigLIP", "`text_model`, `vision_model`; attention pooling is passed over"),
    "clip": ("CLIP", "`text_model` (causal), `vision_model`"),
    "llama": ("Llama, SmolLM2", "decoder; grouped queries"),
    "mistral": ("Mistral", "decoder; sliding window, grouped queries"),
    "qwen2": ("Qwen2, Qwen2.5", "decoder; grouped queries"),
    "qwen3": ("Qwen3", "decoder; grouped queries"),
    "gemma2": ("Gemma 2", "decoder; softcap before the softmax, sliding and full layers"),
    "gemma3_text": ("Gemma 3 (text)", "decoder; sliding and full layers"),
    "phi3": ("Phi-3", "decoder"),
    "gpt2": ("GPT-2", "decoder"),
    "opt": ("OPT", "decoder"),
    "gpt_oss": ("GPT-OSS", "decoder; sinks: rows sum to less than one before mixing"),
    "t5": ("T5", "`^encoder`, `^decoder.*SelfAttention`, `EncDecAttention` (cross); position bias"),
    "bart": ("BART", "`encoder.layers`, `decoder.*self_attn`, `encoder_attn` (cross)"),
    "whisper": ("Whisper", "`encoder.layers`, `decoder.*self_attn`, `encoder_attn` (cross)"),
}

NO_INTERFACE = "computes its maps itself and does not ask transformers' attention interface"

# class -> (families, reason). These were tried: a forward asks the interface for none of them.
REFUSED = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": ("BLOOM", NO_INTERFACE),
    "transformers.models.gptj.modeling_gptj.GPTJAttention": ("GPT-J", NO_INTERFACE),
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": ("CodeGen", NO_INTERFACE),
    "transformers.models.falcon.modeling_falcon.FalconAttention": ("Falcon", NO_INTERFACE),
    "transformers.models.mpt.modeling_mpt.MptAttention": ("MPT", NO_INTERFACE),
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention": ("DeBERTa", NO_INTERFACE),
    "transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": (
        "DeBERTa-v2, DeBERTa-v3",
        NO_INTERFACE,
    ),
    "transformers.models.swinv2.modeling_swinv2.Swinv2SelfAttention": (
        "Swin v2",
        f"{NO_INTERFACE}; timm's Swin v2 can be mixed",
    ),
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": ("XLNet", NO_INTERFACE),
    "transformers.models.longformer.modeling_longformer.LongformerSelfAttention": ("Longformer", NO_INTERFACE),
    "transformers.models.fnet.modeling_fnet.FNetBasicFourierTransform": (
        "FNet",
        "Fourier transforms in the place of attention: there are no maps",
    ),
    "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel": (
        "timm models inside transformers",
        "timm does not ask transformers' attention interface; build the model with timm itself (backbone=timm)",
    ),
    "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperForImageClassification": (
        "timm models inside transformers",
        "timm does not ask transformers' attention interface; build the model with timm itself (backbone=timm)",
    ),
}

# class -> what it is. Passed over with everything inside it: not the model's attention between tokens by heads.
PASSED_OVER = {
    "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": (
        "attention pooling before the head (SigLIP)"
    ),
    "transformers.models.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": (
        "attention pooling before the head (SigLIP 2)"
    ),
}


@dataclass
class _Call:
    """What the interface was asked for in the probe."""

    module: nn.Module
    heads: int
    plain: bool
    """Whether its file computes plain scaled-dot-product attention."""
    problem: str | None
    """Why its maps cannot be mixed."""


_calls: list[_Call] = []  # of the probe that runs
_probing = False  # mixers that are there already rest in a probe


def find_sites(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> tuple[list[AttentionSite], str | None]:
    """The attention layers of a transformers model whose maps can be mixed, in the order of its forward, or why none.

    Runs one forward in eval mode without gradients, in which every layer that asks the attention interface is noted;
    works on the meta device too. Leaves no trace in the model. All or nothing: one attention layer that does not ask,
    or that this forward does not reach, refuses the model, but pooling attention is passed over.

    Args:
        model: a PreTrainedModel, or a module that holds one (its outermost is taken).
        inputs: keyword arguments of the forward; null makes a short text, an image or a silent sound, as it takes.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    top = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if top is None:
        return [], f"{type(model).__name__} is not a model of transformers"
    if getattr(top.config, "reorder_and_upcast_attn", False):
        return [], (
            f"coeff cannot mix the attention of {type(top).__name__}: its option reorder_and_upcast_attn takes a way "
            f"around the attention interface; set it to False in the model's config"
        )
    problems = _bypassing(top, names)
    calls: list[_Call] = []
    if not problems:
        try:
            inputs = probe_inputs(top) if inputs is None else inputs
            calls = _probe(top, inputs)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else ""
            return [], (
                f"coeff could not look for the attention layers of {type(top).__name__}, because a forward failed "
                f"({type(error).__name__}: {first})"
            )
        problems = _mistakes(top, calls, names, inputs)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return [], f"coeff cannot mix the attention of {type(top).__name__}: {'; '.join(problems[:3])}{more}"
    if not calls:
        return [], f"{type(top).__name__} has no attention layers that ask transformers' attention interface"
    found = {id(call.module): call for call in calls}  # each once: a layer may be called for several blocks or parts
    sites = []
    for key, call in found.items():
        name = names[key]
        install = partial(_install, name, call.module, top, call.heads, call.plain)
        route = BOTH_ROUTES if call.plain and _would_run(top, call.module) == SDPA else ROUTE
        sites.append(AttentionSite(name, call.module, call.heads, route, install))
    return sites, None


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Small inputs that reach every attention layer of a transformers model, batch of one, on its device.

    Raises:
        UserError: coeft does not know what the model takes.
    """
    top: Any = model
    takes = inspect.signature(top.forward).parameters
    text = top.config.get_text_config()
    inputs: dict[str, Tensor] = {}
    tokens = (
        torch.arange(2, 8, device=top.device).remainder(max(text.vocab_size, 1))[None] if _has_words(text) else None
    )
    if "input_ids" in takes and tokens is not None:
        inputs["input_ids"] = tokens.clone()
        ends = getattr(text, "eos_token_id", None)
        end = ends[0] if isinstance(ends, list) and ends else ends
        if isinstance(end, int) and end < text.vocab_size:  # classifiers of BART read the hidden state there
            inputs["input_ids"][0, -1] = end
    if "decoder_input_ids" in takes and tokens is not None:
        inputs["decoder_input_ids"] = tokens[:, :4]
    if "pixel_values" in takes:
        vision = getattr(top.config, "vision_config", top.config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.zeros(1, channels, height, width, dtype=top.dtype, device=top.device)
    if "input_features" in takes and hasattr(top.config, "num_mel_bins"):
        shape = (1, top.config.num_mel_bins, 2 * top.config.max_source_positions)
        inputs["input_features"] = torch.zeros(shape, dtype=top.dtype, device=top.device)
        inputs.pop("input_ids", None)
    if "input_values" in takes and not inputs:
        bands = getattr(top.config, "num_mel_bins", None)  # of a spectrogram; else a waveform
        sizes = [16000] if bands is None else [top.config.max_length, bands]
        inputs["input_values"] = torch.zeros(1, *sizes, dtype=top.dtype, device=top.device)
    if not inputs:
        raise UserError(f"{type(top).__name__} takes {', '.join(takes)}: coeft cannot make inputs of that kind")
    return inputs


def _has_words(config: PreTrainedConfig) -> bool:
    return isinstance(getattr(config, "vocab_size", None), int)


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _bypassing(top: nn.Module, names: Mapping[int, str]) -> list[str]:
    """Attention modules that compute their maps without asking the interface, as sentences, one a class."""
    problems: dict[str, str] = {}
    passed: list[str] = []
    for name, module in top.named_modules():
        if any(name.startswith(f"{outer}.") for outer in passed):
            continue
        cls = type(module)
        key = _key(cls)
        if key in PASSED_OVER and name:
            passed.append(name)
        elif key in REFUSED:
            families, why = REFUSED[key]
            problems.setdefault(key, f"{names[id(module)] or 'the model'} ({cls.__name__}, {families}) {_says(why)}")
            passed.append(name)
        elif not _asks(cast(Hashable, cls)) and _attends(cast(Hashable, cls)):
            problems.setdefault(key, f"{names[id(module)] or 'the model'} ({key}) {NO_INTERFACE}")
    return list(problems.values())


def _says(reason: str) -> str:
    return reason if reason.startswith(NO_INTERFACE) else f"cannot be mixed: {reason}"


@cache
def _asks(cls: Hashable) -> bool:
    """Whether the forward of a class hands its module file's eager_attention_forward to the interface."""
    forward = inspect.unwrap(cast(Any, cls).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "eager_attention_forward" in code.co_names


@cache
def _attends(cls: Hashable) -> bool:
    """Whether a class is called an attention and computes a softmax, or a product that stands for one, by itself."""
    for base in inspect.getmro(cast(type, cls)):
        if base is nn.MultiheadAttention:
            return True
        if not re.search(r"Attention|Attn", base.__qualname__) or base.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # no source, such as a class typed into a session
            continue
        if re.search(r"\b(softmax|Softmax|scaled_dot_product_attention)\(", source):
            return True
    return False


def _mistakes(top: nn.Module, calls: list[_Call], names: Mapping[int, str], inputs: Mapping[str, Any]) -> list[str]:
    """What the probe found that forbids mixing, as sentences."""
    found = [
        f"{names[id(call.module)]} ({type(call.module).__name__}) {call.problem}" for call in calls if call.problem
    ]
    called = {id(call.module) for call in calls}
    silent = [m for m in top.modules() if id(m) not in called and _asks(cast(Hashable, type(m)))]
    for module in silent[:1]:
        count = f" and {len(silent) - 1} more layers" if len(silent) > 1 else ""
        found.append(
            f"{names[id(module)]} ({type(module).__name__}){count} did not ask the interface in a forward with "
            f"{', '.join(inputs)}"
        )
    heads: dict[int, int] = {}
    for call in calls:
        if heads.setdefault(id(call.module), call.heads) != call.heads:
            found.append(f"{names[id(call.module)]} is called with different numbers of heads")
    return list(dict.fromkeys(found))


def _probe(top: PreTrainedModel, inputs: Mapping[str, Any]) -> list[_Call]:
    """What a forward asks the interface for, in order."""
    global _probing
    before = [(config, config._attn_implementation) for config in _configs(top)]
    _calls.clear()
    _probing = True
    try:
        for config, _ in before:
            config._attn_implementation = PROBE
        # not inference_mode: tensors that a model caches in this forward must serve in training later
        with evaluating(top), torch.no_grad(), torch.random.fork_rng(devices=[]):
            top(**inputs)
        return list(_calls)
    finally:
        _probing = False
        _calls.clear()
        for config, name in before:
            config._attn_implementation = name


def _configs(top: nn.Module) -> list[Any]:
    """Every config of a model and of what is inside it, outer ones first: setting a name on one sets it below."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                add(getattr(config, key, None))

    for module in top.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _install(name: str, module: nn.Module, top: PreTrainedModel, heads: int, plain: bool, mixer: nn.Module) -> None:
    """Put a mixer into an attention module of transformers, and set the model's attention implementation to coeft's.

    Raises:
        UserError: the module has a mixer.
    """
    mixer = cast(CoeffMixer, mixer)
    if hasattr(module, "coeff_mix"):
        raise UserError(f"{name} has a coeff mixer already: attach a stack to a fresh model")
    if mixer.num_heads != heads:
        raise ValueError(f"{name} has {heads} heads, the mixer {mixer.num_heads}")
    mixer.plain = plain
    _switch(top)
    module.add_module("coeff_mix", mixer)
    module.register_forward_pre_hook(_on_start)
    module.register_forward_hook(_on_end)


def _switch(top: PreTrainedModel) -> None:
    """Let every layer ask for coeft's attention, and build the masks that its own attention had."""
    before = [(config, config._attn_implementation) for config in _configs(top)]
    if all(name in (EAGER, SDPA) for _, name in before):
        return
    for other in sorted({str(name) for _, name in before} - {"eager", "sdpa", "None", EAGER, SDPA}):
        plain = "sdpa" if top._supports_sdpa else "eager"
        log.warning("%s gives no attention maps: layers of %s without coeff run %s", other, type(top).__name__, plain)
    vars(top).setdefault(BEFORE, before)
    top.set_attn_implementation(_ours(top, top.config._attn_implementation))
    for config, name in before:  # parts may have run another attention than the whole
        config._attn_implementation = _ours(top, name)


def remove_mixers(model: nn.Module) -> None:
    """Take every mixer out of a transformers model: its layers run the attention that they ran before."""
    for module in list(model.modules()):
        if isinstance(module._modules.get("coeff_mix"), CoeffMixer):
            drop_hooks(module._forward_pre_hooks, _on_start)
            drop_hooks(module._forward_hooks, _on_end)
            del module.coeff_mix
    for top in model.modules():
        for config, name in vars(top).pop(BEFORE, []):
            config._attn_implementation = name


def _ours(top: PreTrainedModel, name: str | None) -> str:
    """coeft's name for a model that ran `name`; flash and flex kernels, which give no maps, run as sdpa."""
    if name in (EAGER, SDPA):
        return name
    return EAGER if name in ("eager", None) or not top._supports_sdpa else SDPA


def _would_run(top: PreTrainedModel, module: nn.Module) -> str:
    """coeft's name for what an attention layer runs."""
    config = getattr(module, "config", None)
    return _ours(top, getattr(config, "_attn_implementation", top.config._attn_implementation))


# Hooks of an attention module with a mixer: functions of this file that find the mixer on the module they are called
# for, so that a deep copy of the model acts on its own mixers.


def _on_start(module: nn.Module, args: Any) -> None:
    cast(CoeffMixer, module.coeff_mix).active = False


def _on_end(module: nn.Module, args: Any, output: Any) -> None:
    """The layer must have passed its maps through the mixer.

    Raises:
        RuntimeError: it did not, so that the coefficients would silently have no effect.
    """
    mixer = cast(CoeffMixer, module.coeff_mix)
    if mixer.mixes and not mixer.active and not _probing:
        now = getattr(getattr(module, "config", None), "_attn_implementation", None)
        raise RuntimeError(
            f"{mixer.site}: the attention maps did not pass through the coeff mixer, so that the coefficients would "
            f"have no effect; the attention implementation is {now!r} now: "
            f"model.set_attn_implementation({SDPA if now == 'sdpa' else EAGER!r}) restores coeft's"
        )
    mixer.active = False


# What is registered.


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """eager_attention_forward of the file that defines the module's class, or of a base class's file."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise RuntimeError(f"{type(module).__name__} asks for attention, but its file has no eager_attention_forward")


def _attention(
    base: Callable[..., tuple[Tensor, Tensor | None]] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer: query (B, H, N, E), key (B, H_kv, M, E), value (B, H_kv, M, D) -> (B, N, H, D), maps.

    The maps are (B, H, N, M), mixed where the layer has a mixer, or None on the fused route; what a layer without one
    gives is its own business.
    """
    eager = _eager_of(module)
    mixer = getattr(module, "coeff_mix", None)
    if mixer is None or not mixer.mixes:
        return (base or eager)(module, query, key, value, attention_mask, **kwargs)
    mask = attention_mask
    fits = base is not None and mixer.plain and hf_fused.unchanged(kwargs)
    if fits and mixer.takes_all(query.shape[0], query.shape[2], key.shape[2]):
        return hf_fused.attend(mixer, module, query, key, value, mask, **kwargs), None
    if base is not None:
        mask = _additive(module, query, key, attention_mask, kwargs.get("is_causal"))
    # of a value of width one, since only the maps are wanted
    maps = mixer(eager(module, query, key, value[..., :1], mask, **kwargs)[1])
    output = maps @ _per_head(value, query)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # a query that sees no key, as padding on the left: sdpa gives zeros, eager the mean of all values
        output = output.masked_fill(~attention_mask.any(-1, keepdim=True).any(1, keepdim=True), 0.0)
    return output.transpose(1, 2).contiguous(), maps


def _per_head(value: Tensor, query: Tensor) -> Tensor:
    """(B, H_kv, M, D) -> (B, H, M, D): the value head that each query head uses."""
    groups = query.shape[1] // value.shape[1]
    return value if groups == 1 else value.repeat_interleave(groups, 1)


def _additive(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """The mask that sdpa would apply, as eager attention adds it to the scores."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if query.shape[2] == 1 or not causal:
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    # not -inf: a row that is masked everywhere must not give NaN, also where the softmax is taken in float32
    low = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, low)


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Eager attention that notes the call and checks what mixing relies on."""
    output, maps = _eager_of(module)(module, query, key, value, attention_mask, **kwargs)
    problem = None
    if maps.dim() != 4 or maps.shape[:3] != query.shape[:3] or query.shape[1] % value.shape[1]:
        problem = f"has maps {list(maps.shape)} for queries {list(query.shape)}, not (batch, heads, queries, keys)"
    elif getattr(module, "is_causal", False) is True and query.shape[2] > 1 and attention_mask is None:
        problem = "is causal, but transformers built no mask for it"
    elif not maps.is_meta:
        again = (maps @ _per_head(value, query)).transpose(1, 2)
        if output.shape != again.shape or not torch.allclose(output.float(), again.float(), rtol=1e-2, atol=1e-3):
            problem = "does not multiply the maps that it returns with the values"
    plain = hf_fused.is_plain(_eager_of(module)) and hf_fused.unchanged(kwargs)
    _calls.append(_Call(module, query.shape[1], plain, problem))
    return output, maps


AttentionInterface.register(EAGER, partial(_attention, None))
AttentionInterface.register(SDPA, partial(_attention, sdpa_attention_forward))
AttentionInterface.register(PROBE, _note)
# without a mask function of the same name, transformers would build no masks at all and say nothing
AttentionMaskInterface.register(EAGER, eager_mask)
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionMaskInterface.register(PROBE, eager_mask)
