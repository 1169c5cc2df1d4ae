"""GGUF files: a small Llama that the tests write, and SmolLM2 as PyPI has it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from models import smollm2
from tiny_hf import VOCAB, tiny_inputs, tiny_model
from torch import Tensor

from coeft.adapt import Stack
from coeft.backbones.hf import HF
from coeft.errors import UserError
from coeft.methods.coeff import Coeff

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as llama.cpp has them: the two halves of every head by turns."""
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, 2, rows, -1).transpose(1, 2).reshape(weight.shape)


def write_llama(path: Path, model: Any, architecture: str = "llama") -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<s>", "</s>", *(chr(ord("!") + number) for number in range(VOCAB - 4)), "!!"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                value = interleaved(value, count)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name.replace("model.layers", "blk"), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_config_weights_and_tokenizer(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    file = write_llama(tmp_path / "tiny é.gguf", plain)
    inputs = tiny_inputs("llama")
    backbone = HF(name="someone/tiny", weights=str(file)).build(0, 0, head="lm")
    backbone.model.eval()
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(backbone.forward(inputs), expected, rtol=1e-5, atol=1e-5)
    assert backbone.tokenizer.chat_template.startswith("{{ messages") and backbone.tokenizer.pad_token == "</s>"
    assert backbone.tokenizer("#")["input_ids"][-1] == 5
    classifier = HF(name=str(file)).build(3, 0)
    assert classifier.head == "score" and classifier.forward(inputs).shape == (2, 3)
    assert torch.equal(
        classifier.model.get_parameter("model.norm.weight"), backbone.model.get_parameter("model.norm.weight")
    )
    drawn = HF(name=str(file), pretrained=False, options={"num_hidden_layers": 1}).build(3, 0)
    assert len(drawn.blocks) == 1


def test_gguf_files_that_transformers_does_not_read_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="mine.gguf cannot be read: GGUF model with architecture mine is not supported"):
        HF(name="x", weights=str(write_llama(tmp_path / "mine.gguf", model, "mine"))).build(2, 0)
    whole = write_llama(tmp_path / "whole.gguf", model).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.gguf cannot be read"):
        HF(name="x", weights=str(tmp_path / "cut.gguf")).build(2, 0)
    with pytest.raises(UserError, match="model.layers.2.* is missing"):
        HF(name="x", weights=str(tmp_path / "whole.gguf"), options={"num_hidden_layers": 3}).build(2, 0)


@pytest.fixture(scope="module")
def smollm() -> Any:
    backbone: Any = HF(name="HuggingFaceTB/SmolLM2-135M-Instruct", weights=str(smollm2())).build(0, 0, head="lm")
    backbone.model.eval()
    return backbone


@pytest.mark.slow
def test_smollm2_answers_from_its_gguf_file(smollm: Any) -> None:
    assert [site.num_heads for site in smollm.sites] == [9] * 30 and len(smollm.blocks) == 30
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    inputs = smollm.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    tokens = smollm.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in smollm.tokenizer.decode(tokens)


@pytest.mark.slow
def test_smollm2_takes_coeff_and_pads_on_either_side(smollm: Any) -> None:
    texts = ["The sun rises in the east and", "One two three"]
    logits = []
    for side in ("left", "right"):
        smollm.tokenizer.padding_side = side
        batch = smollm.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits.append(smollm.forward(batch)[batch["attention_mask"].bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-3)
    stack = Stack({"coeff": Coeff()})
    stack.attach(smollm, 0)
    assert sum(p.numel() for p in stack.parameters()["coeff"].values()) == 30 * 81
    with torch.no_grad():
        after = stack.probe(smollm, batch)[batch["attention_mask"].bool()]
    torch.testing.assert_close(after, logits[1], rtol=1e-4, atol=1e-3)
