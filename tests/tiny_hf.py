"""Small models of the transformers families that coeff is tested on, random weights large enough to show effects."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny import scale_up
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCAB = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    **SPECIAL,
}
DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    **SPECIAL,
}
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
STRIDES = {"frequency_stride": 4, "time_stride": 8}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
TOWERS = {"text_config": ENCODER, "vision_config": VISION}
SPEECH = {
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 1,
    **SPECIAL,
}


@dataclass(frozen=True)
class Family:
    """A small model: its class, its config, and what coeff must find in it."""

    model: str
    config: str
    options: dict[str, Any]
    heads: list[int]
    """Query heads of every attention layer, in the order of the forward."""
    kind: str = "text"
    """text: an encoder; causal: a decoder; seq2seq: both; speech; sound; image; both: a text and an image tower."""
    sdpa: bool = True
    """Whether transformers runs it with sdpa."""
    sliding: dict[str, Any] = field(default_factory=dict)
    """Options that make every layer attend in a window of 4."""


def _decoder(name: str, **options: Any) -> Family:
    sdpa, sliding = options.pop("sdpa", True), options.pop("sliding", {})
    config = options.pop("config", f"{name}Config")
    return Family(f"{name}ForCausalLM", config, DECODER | options, [4, 4], "causal", sdpa, sliding)


WINDOW = {"layer_types": ["sliding_attention", "sliding_attention"]}

FAMILIES = {
    "bert": Family("BertForSequenceClassification", "BertConfig", ENCODER, [3, 3]),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", ENCODER, [3, 3]),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3, "vocab_size": VOCAB, **SPECIAL},
        [3, 3],
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        ENCODER | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
        [3, 3],
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", VISION, [3, 3], "image"),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", VISION, [3, 3], "image"),
    "ast": Family(
        "ASTForAudioClassification",
        "ASTConfig",
        {k: v for k, v in VISION.items() if k != "image_size"} | {"num_mel_bins": 16, "max_length": 24} | STRIDES,
        [3, 3],
        "sound",
    ),
    "siglip": Family("SiglipModel", "SiglipConfig", TOWERS, [3, 3, 3, 3], "both"),
    "clip": Family("CLIPModel", "CLIPConfig", TOWERS | {"projection_dim": 20}, [3, 3, 3, 3], "both"),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=4, sliding={"sliding_window": 4}),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma2": _decoder("Gemma2", sdpa=False, attn_logit_softcapping=2.0, sliding=WINDOW, **SLIDING),
    "gemma3": _decoder("Gemma3", config="Gemma3TextConfig", sliding=WINDOW, **SLIDING),
    "phi3": _decoder("Phi3"),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40, "vocab_size": VOCAB, **SPECIAL},
        [3, 3],
        "causal",
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        ENCODER | {"ffn_dim": 40, "word_embed_proj_dim": 24},
        [3, 3],
        "causal",
    ),
    "gpt_oss": _decoder(
        "GptOss",
        sdpa=False,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding=WINDOW,
        **SLIDING,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
        [4] * 6,
        "seq2seq",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        SPEECH | {"encoder_layers": 2, "max_position_embeddings": 40, "forced_eos_token_id": None},
        [3, 3, 4, 4, 4, 4],
        "seq2seq",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SPEECH | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40},
        [3, 4, 4, 4, 4],
        "speech",
    ),
}


def config_of(family: str, **options: Any) -> Any:
    chosen = FAMILIES[family]
    given = chosen.options | options
    return getattr(transformers, chosen.config)(**given)


def tiny_model(family: str, implementation: str = "eager", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A small random model of a family, in eval mode."""
    torch.manual_seed(seed)
    config = config_of(family, **options)
    config._attn_implementation = implementation
    model: Any = getattr(transformers, FAMILIES[family].model)(config)
    scale_up(model, seed)
    return model.eval()


def tiny_inputs(family: str, padding: str = "", seed: int = 1, tokens: int = 9) -> dict[str, Tensor]:
    """Two inputs of a family; padding "left" or "right" masks three tokens of the second text."""
    kind, draw = FAMILIES[family].kind, torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    if kind in ("image", "both"):
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=draw)
    if kind == "sound":
        inputs["input_values"] = torch.randn(2, 24, 16, generator=draw)
    if kind == "speech":
        inputs["input_features"] = torch.randn(2, 8, 24, generator=draw)
    if kind in ("text", "causal", "seq2seq", "both"):
        inputs["input_ids"] = torch.randint(3, VOCAB, (2, tokens), generator=draw)
        inputs["attention_mask"] = torch.ones(2, tokens, dtype=torch.long)
        if padding:
            inputs["attention_mask"][1, : 3 if padding == "left" else tokens] = 0
            if padding == "right":
                inputs["attention_mask"][1, : tokens - 3] = 1
    if kind in ("seq2seq", "speech"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 6), generator=draw)
    return inputs


def result(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model makes of its inputs, one row a sample: (2, ...)."""
    output = model(**inputs)
    if "text_embeds" in output:
        return torch.cat([output.text_embeds, output.image_embeds], 1)
    return output.logits
