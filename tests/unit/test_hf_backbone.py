"""Building transformers backbones: files, heads, tokenizers, sizes, types and what a user can do wrong."""

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants
from models import minilm
from safetensors.torch import load_file, save_file
from tiny import scale_up
from tiny_hf import VOCAB, tiny_inputs, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import coeft
from coeft.adapt import Stack
from coeft.adapter_io import fingerprint, save_adapter
from coeft.backbones import _hf_source, _network
from coeft.backbones._hf import HFBackbone
from coeft.backbones._hf_images import from_processor
from coeft.backbones.hf import HF
from coeft.errors import UserError
from coeft.methods.bitfit import BitFit
from coeft.methods.coeff import Coeff
from coeft.methods.lora import LoRA

CONF = Path(__file__).parents[2] / "conf" / "backbone"
WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(VOCAB - 3))]


def tokenizer(**special: str) -> Any:
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **special)


def save(folder: Path, family: str, *, words: bool = True, **special: str) -> Path:
    """A tiny model of a family as transformers saves it: folder/config.json, model.safetensors, tokenizer."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    if words:
        tokenizer(**special).save_pretrained(folder)
    return folder


def built(
    folder: Path, outputs: int = 3, seed: int = 0, image_size: Any = None, head: str = "classifier", **changes: Any
) -> Any:
    backbone = HF(name=str(folder), **changes).build(outputs, seed, image_size, head=head)
    assert isinstance(backbone, HFBackbone) and backbone.model.training
    backbone.model.eval()
    return backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> a folder with a tiny model of it, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def test_a_text_encoder_states_its_facts(folder: Any) -> None:
    backbone = built(folder("bert"), 5)
    assert (backbone.kind, backbone.head, backbone.modality) == ("hf", "classifier", "text")
    assert backbone.name == str(folder("bert"))
    assert [site.num_heads for site in backbone.sites] == [3, 3] and backbone.refusal is None
    assert backbone.blocks == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert backbone.model.config.num_labels == 5 and len(backbone.model.config.id2label) == 5
    assert set(backbone.head_parameters()) == {"classifier.weight", "classifier.bias"}
    assert backbone.tokenizer.pad_token == "</s>"
    assert backbone.forward(tiny_inputs("bert") | {"labels": torch.tensor([0, 1])}).shape == (2, 5)
    assert all(module.training for module in HF(name=str(folder("bert"))).build(5, 0).model.modules())


@pytest.mark.parametrize(
    ("family", "kind", "sites"),
    [
        ("roberta", "RobertaForSequenceClassification", 2),
        ("modernbert", "ModernBertForSequenceClassification", 2),
        ("llama", "LlamaForSequenceClassification", 2),
        ("gemma3", "Gemma3TextForSequenceClassification", 2),
        ("gpt2", "GPT2ForSequenceClassification", 2),
        ("vit", "ViTForImageClassification", 2),
        ("clip", "CLIPForImageClassification", 2),
        ("siglip", "SiglipForImageClassification", 2),
    ],
)
def test_the_classifier_is_of_the_models_kind_and_has_any_number_of_outputs(
    family: str, kind: str, sites: int, folder: Any
) -> None:
    image = family in ("vit", "clip", "siglip")
    backbone = built(folder(family), 0)
    assert type(backbone.model).__name__ == kind and len(backbone.sites) == sites and not backbone.refusal
    assert backbone.modality == ("image" if image else "text") and (backbone.tokenizer is None) == image
    inputs = tiny_inputs("vit" if image else "bert")
    before = fingerprint(backbone.model, backbone.head)
    for outputs in (7, 1):
        backbone.new_head(outputs, 0)
        assert backbone.forward(inputs).shape == (2, outputs)
        assert backbone.forward(inputs).isfinite().all()
    assert fingerprint(backbone.model, backbone.head) == before
    source = load_file(folder(family) / "model.safetensors")
    block = next(p for n, p in backbone.model.named_parameters() if n.startswith(backbone.blocks[1]) and p.ndim == 2)
    assert any(value.shape == block.shape and torch.equal(value, block) for value in source.values())


def test_a_head_follows_from_the_seed_alone_whether_early_or_late(folder: Any) -> None:
    early, late, other = built(folder("bert"), 4, 3), built(folder("bert"), 0, 3), built(folder("bert"), 4, 5)
    torch.rand(7)
    late.new_head(4, 3)
    for name, parameter in early.head_parameters().items():
        assert torch.equal(parameter, late.head_parameters()[name])
    weight = early.head_parameters()["classifier.weight"]
    assert not torch.equal(weight, other.head_parameters()["classifier.weight"])
    assert 0.01 < weight.std() < 0.04  # BERT's initializer_range


def test_random_weights_follow_from_the_seed_and_need_a_config_alone(folder: Any, tmp_path: Path) -> None:
    shutil.copy(folder("bert") / "config.json", tmp_path)
    first, again, other = (built(tmp_path, 2, seed, pretrained=False) for seed in (3, 3, 4))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first.model.get_parameter(name), again.model.get_parameter(name))
    assert not torch.equal(first.model.get_parameter(name), other.model.get_parameter(name))
    assert first.tokenizer is None
    deeper = built(tmp_path, 2, pretrained=False, options={"num_hidden_layers": 3, "hidden_dropout_prob": 0.5})
    assert len(deeper.blocks) == 3 and deeper.model.config.hidden_dropout_prob == 0.5


def test_a_language_model_keeps_its_output_layer(folder: Any) -> None:
    backbone = built(folder("llama"), 0, head="lm")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder("llama"))
    assert backbone.head == "" and backbone.head_parameters() == {}
    inputs = tiny_inputs("llama", "right")
    got, expected = backbone.forward(inputs), plain(**inputs).logits
    shown = inputs["attention_mask"].bool()
    assert got.shape == (2, 9, VOCAB) and torch.equal(got[shown], expected[shown])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("head", ["classifier", "lm"])
def test_padding_on_either_side_gives_the_same(family: str, head: str, folder: Any) -> None:
    backbone = built(folder(family), 3 if head == "classifier" else 0, head=head)
    pad = backbone.tokenizer.pad_token_id
    words = [[5, 9, 8, 30, 12], [7, 6, 40]]

    def batch(side: str) -> dict[str, Tensor]:
        rows = [[pad] * (5 - len(row)) + row if side == "left" else row + [pad] * (5 - len(row)) for row in words]
        shown = [[0] * (5 - len(row)) + [1] * len(row) for row in words]
        mask = torch.tensor(shown if side == "left" else [row[::-1] for row in shown])
        return {"input_ids": torch.tensor(rows), "attention_mask": mask}

    with torch.no_grad():
        left, right = (backbone.forward(batch(side)) for side in ("left", "right"))
        alone = backbone.forward({key: value[1:, :3] for key, value in batch("right").items()})
    if head == "lm":
        left, right, alone = left[1, 2:], right[1, :3], alone[0]
    else:
        torch.testing.assert_close(right[1], alone[0])
    torch.testing.assert_close(left, right)
    assert alone.std() > 1e-3


def test_the_last_token_of_a_text_is_read_and_not_the_padding(folder: Any) -> None:
    backbone = built(folder("llama"), 3)
    pad = backbone.tokenizer.pad_token_id
    assert backbone.model.config.pad_token_id == pad == 2
    ids = torch.tensor([[5, 9, 8, pad], [5, 9, 7, pad]])
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    one, other = backbone.forward({"input_ids": ids, "attention_mask": mask})
    assert (one - other).abs().max() > 1e-4


def test_a_padding_token_of_the_tokenizer_is_kept_and_a_missing_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = built(save(tmp_path / "own", "llama", pad_token="<pad>"))
    assert own.tokenizer.pad_token_id == 0 == own.model.config.pad_token_id
    with caplog.at_level(logging.INFO, "coeft"):
        built(save(tmp_path / "none", "llama"))
    assert "its tokenizer has no padding token; its end token </s> pads" in caplog.text


def test_images_go_through_what_the_processor_says(folder: Any, tmp_path: Path) -> None:
    shutil.copytree(folder("vit"), tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(tmp_path / "vit")
    look = built(tmp_path / "vit").preprocessing
    assert (look.image_size, look.resize, look.interpolation) == ((32, 32), "squash", "bicubic")
    assert look.mean == (0.5,) * 3 and look.std == (0.5,) * 3
    without = built(folder("clip")).preprocessing  # from the class of CLIP's processor and the model's config
    assert without.image_size == (32, 32) and without.mean[0] == pytest.approx(0.48145466)


CLIP_LIKE = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
}
NORM = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}


@pytest.mark.parametrize(
    ("tree", "size", "resize", "crop_pct", "interpolation"),
    [
        (CLIP_LIKE, 224, "crop", 0.875, "bicubic"),
        ({"size": 224, "crop_size": 224, "do_center_crop": True}, 224, "crop", 1.0, "bilinear"),
        ({"size": 384}, 384, "squash", 1.0, "bilinear"),
        ({"size": {"height": 30, "width": 30}, "resample": 0}, 30, "squash", 1.0, "nearest"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, "crop", 0.875, "bilinear"),
    ],
)  # fmt: skip
def test_forms_of_image_processors(tree: dict, size: int, resize: str, crop_pct: float, interpolation: str) -> None:
    look = from_processor(NORM | tree, "x", None, None)
    assert (look.image_size, look.resize, look.interpolation) == ((size, size), resize, interpolation)
    assert look.crop_pct == pytest.approx(crop_pct) and look.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"resample": 1}, "resample 1 is none of 0, 2, 3"),
        ({"rescale_factor": 1.0}, "scaled by 1/255, not by 1.0"),
        ({"image_mean": None}, "image_mean and image_std must be lists"),
        ({"size": None}, "names no image size: set data.image_size"),
    ],
)
def test_image_processors_that_coeft_does_not_follow_are_refused(tree: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_processor({"size": 224} | NORM | tree, "x", None, None)


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip", "clip"])
def test_another_image_size_interpolates_position_embeddings(family: str, folder: Any) -> None:
    backbone = built(folder(family), 3, image_size=(64, 32))
    assert backbone.preprocessing.image_size == (64, 32)
    assert backbone.forward({"pixel_values": torch.randn(2, 3, 64, 32)}).shape == (2, 3)
    with pytest.raises(UserError, match="36 x 36 pixels are not a multiple of the patches of .*, 8 x 8"):
        built(folder(family), 3, image_size=36)


def test_the_head_is_fp32_over_a_model_in_bf16(folder: Any) -> None:
    for family in ("bert", "llama", "vit"):
        backbone = built(folder(family), 3, dtype="bf16")
        head = backbone.head_parameters()
        assert {p.dtype for p in head.values()} == {torch.float32}
        assert {p.dtype for n, p in backbone.model.named_parameters() if n not in head} == {torch.bfloat16}
        Stack({"coeff": Coeff(), "lora": LoRA(rank=2)}).attach(backbone, 0)
        inputs = tiny_inputs("bert" if family == "llama" else family, "" if family == "vit" else "right")
        logits = backbone.forward(inputs)
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        logits.square().sum().backward()
        assert all(p.grad is not None for p in backbone.model.parameters() if p.requires_grad)
        reference = built(folder(family), 3).forward(inputs)
        assert (logits - reference).abs().max() < 0.1 * reference.abs().max() + 0.05


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classifier"), ("llama", "classifier"), ("llama", "lm"), ("vit", "classifier")]
)
def test_gradient_checkpointing_changes_no_gradient(family: str, head: str, folder: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = built(
            folder(family), 3 if head == "classifier" else 0, head=head, gradient_checkpointing=checkpointing
        )
        assert backbone.model.is_activation_checkpointing is checkpointing
        scale_up(backbone.model, 0)
        stack = Stack({"coeff": Coeff(), "lora": LoRA(rank=2)})
        stack.attach(backbone, 0)
        draw = torch.Generator().manual_seed(0)
        for parameter in (p for owned in stack.parameters().values() for p in owned.values()):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        backbone.model.train()
        torch.manual_seed(1)
        backbone.forward(tiny_inputs("bert" if family == "llama" else family)).square().sum().backward()
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) >= 2 + 2 * 2
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_what_the_weights_lack_before_the_classifier_is_drawn_and_trained_with_it(
    folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DistilBERT's dense layer before the classifier, and a pooler that masked-language checkpoints lack."""
    shutil.copytree(folder("bert"), tmp_path / "bert")
    state = load_file(tmp_path / "bert" / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "pooler" not in k}, tmp_path / "bert" / "model.safetensors", {"format": "pt"}
    )
    with caplog.at_level(logging.INFO, "coeft"):
        backbone = built(tmp_path / "bert", 3)
    assert "has no weights of bert.pooler: drawn and trained with the head" in caplog.text
    assert backbone.drawn == ("bert.pooler",) and backbone.heads == ["classifier", "bert.pooler"]
    assert set(backbone.head_parameters()) == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    again, other = built(tmp_path / "bert", 3), built(tmp_path / "bert", 3, seed=1)
    name = "bert.pooler.dense.weight"
    assert torch.equal(backbone.model.get_parameter(name), again.model.get_parameter(name))
    assert not torch.equal(backbone.model.get_parameter(name), other.model.get_parameter(name))
    assert fingerprint(backbone.model, backbone.heads) == fingerprint(other.model, other.heads)
    Stack({"lora": LoRA(rank=2)}).attach(backbone, 0)
    backbone.model.train()
    backbone.forward(tiny_inputs("bert")).square().sum().backward()
    assert backbone.model.get_parameter(name).grad.abs().max() > 0
    distil: Any = tiny_model("distilbert").distilbert
    distil.save_pretrained(tmp_path / "distil")
    assert built(tmp_path / "distil", 3).heads == ["classifier", "pre_classifier"]


def test_a_classifier_in_the_weights_is_dropped_and_said(folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "coeft"):
        backbone = built(folder("bert"), 3)
    assert "its classifier (classifier) is dropped; the task gets a fresh one" in caplog.text
    held = load_file(folder("bert") / "model.safetensors")["classifier.weight"]
    assert held.shape[0] == 2 and not torch.equal(backbone.model.classifier.weight[:2], held)


def test_weights_stand_for_a_name_that_is_not_there(folder: Any) -> None:
    for weights in (folder("bert"), folder("bert") / "model.safetensors"):
        backbone = HF(name="someone/bert", weights=str(weights)).build(3, 0)
        assert backbone.name == "someone/bert" and backbone.tokenizer is not None  # type: ignore[attr-defined]
        weight = load_file(folder("bert") / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
        assert torch.equal(backbone.model.get_parameter("bert.embeddings.word_embeddings.weight"), weight)


def test_a_safetensors_file_apart_takes_config_and_tokenizer_from_the_name(folder: Any, tmp_path: Path) -> None:
    shutil.copy(folder("bert") / "model.safetensors", tmp_path / "w é.safetensors")
    backbone = built(folder("bert"), 3, weights=str(tmp_path / "w é.safetensors"))
    assert backbone.tokenizer is not None and torch.equal(
        backbone.model.bert.pooler.dense.weight, load_file(tmp_path / "w é.safetensors")["bert.pooler.dense.weight"]
    )


def changed(source: Path, target: Path, config: dict | None = None, state: Any = None) -> Path:
    """A copy of a model's folder with other keys in its config, or other tensors."""
    shutil.copytree(source, target)
    tree = json.loads((target / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    if state is not None:
        save_file(state(load_file(target / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def without(key: str) -> Any:
    return lambda state: {name: value for name, value in state.items() if key not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": without("layer.1.output.dense.bias")}, "BertForS.*: bert.*layer.1.output.dense.bias is missing$"),
        ({"state": without("pooler.dense.bias")}, "bert.pooler.dense.bias is missing$"),
        ({"state": without("embeddings.LayerNorm")}, "bert.embeddings.LayerNorm.bias is missing; bert.embeddings"),
        ({"config": {"num_hidden_layers": 1}}, "bert.encoder.layer.1.attention.* is unexpected"),
        ({"config": {"num_hidden_layers": 3}}, "bert.encoder.layer.2.attention.* is missing"),
        ({"config": {"intermediate_size": 41}}, r"intermediate.dense.bias is \[40\], not \[41\]"),
        ({"config": {"model_type": "brt"}}, "has no model_type 'brt'; did you mean b"),
        ({"config": {"model_type": None}}, "'model_type' is missing"),
        ({"config": {"model_type": "m", "auto_map": {"AutoConfig": "m.M"}}}, "brings Python.*trust_remote_code=true"),
        ({"config": {"hidden_size": "wide"}}, "the config of .* cannot be read"),
        ({"config": {"num_attention_heads": 5}}, "transformers cannot build bert from .*multiple of"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(change: dict, message: str, folder: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        built(changed(folder("bert"), tmp_path / "model", **change))


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("touch run-by-a-pickle",)


def test_damaged_and_dangerous_files_are_refused(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = changed(folder("bert"), tmp_path / "model")

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            HF(**({"name": str(model)} | settings)).build(3, 0)

    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:5000])
    refused("the weights of .*model cannot be read")
    Path("cut.safetensors").write_bytes(whole[:5000])
    refused("cut.safetensors is no whole safetensors file", weights="cut.safetensors")
    (model / "model.safetensors").unlink()
    refused("the weights of .*model cannot be read: .*no file named")
    torch.save({"x": Code()}, model / "pytorch_model.bin")
    refused("coeft runs no code from weight files")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    refused("coeft runs no code from weight files|cannot be read")
    assert not Path("run-by-a-pickle").exists()
    refused(
        "cut.bin is neither a folder, a .gguf nor a .safetensors",
        weights=str(shutil.copy("cut.safetensors", "cut.bin")),
    )
    refused("there is no file or folder absent.gguf", weights="absent.gguf")
    Path("text.gguf").write_text("hello")
    refused("text.gguf is not a GGUF file", weights="text.gguf")
    Path("cut.gguf").write_bytes(b"GGUF" + bytes(40))
    refused("the config of cut.gguf cannot be read", weights="cut.gguf")
    monkeypatch.setattr(_hf_source, "find_spec", lambda name: None)
    refused(r"cut.gguf needs the package gguf: pip install 'coeft\[gguf\]'", weights="cut.gguf")
    Path("empty").mkdir()
    refused("empty has no config.json", name="empty")
    Path("empty/model.gguf").touch()
    refused("empty has no config.json.*backbone.weights=empty/model.gguf", name="empty")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").touch()
    refused("adapter holds an adapter, not a model", name="adapter")
    refused("there is no folder ./absent", name="./absent")
    refused("'no id' is neither a folder nor a hub id", name="no id")
    (model / "config.json").write_text("{")
    refused("config.json: not readable as JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "backbone.name is missing"),
        ({"dtype": "float32"}, "no type 'float32'; did you mean|there are auto"),
        ({"quantization": "2bit"}, "must be null, 8bit or 4bit"),
        ({"quantization": "4bit", "pretrained": False}, "needs pre-trained weights"),
        ({"options": {"num_labels": 3, "torch_dtype": 1}}, "num_labels, torch_dtype cannot be set here"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HF(**({"name": "x"} | changes))


def test_options_that_a_model_does_not_have_are_refused(folder: Any) -> None:
    with pytest.raises(UserError, match=r"\(bert\) has no 'hidden_dropout'; did you mean hidden_dropout_prob"):
        built(folder("bert"), options={"hidden_dropout": 0.1})


def test_a_model_without_such_a_head_is_refused(folder: Any) -> None:
    with pytest.raises(UserError, match=r"\(bert\) is no causal language model: it reads texts in both directions"):
        built(folder("bert"), 0, head="lm")
    with pytest.raises(UserError, match=r"\(vit\) is no causal language model"):
        built(folder("vit"), 0, head="lm")
    with pytest.raises(UserError, match=r"\(whisper\) takes sound in a form that coeft does not make"):
        tiny_model("whisper").config.save_pretrained(folder("bert").parent / "w")
        built(folder("bert").parent / "w")
    with pytest.raises(UserError, match=r"no classifier of texts, images or sound for .* \(vits\)"):
        transformers.VitsConfig().save_pretrained(folder("bert").parent / "v")
        built(folder("bert").parent / "v")


def test_quantisation_without_its_package_or_a_device_is_refused(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coeft.backbones import _hf

    monkeypatch.setattr(_hf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="quantization=4bit needs the package bitsandbytes"):
        built(folder("bert"), quantization="4bit")
    monkeypatch.setattr(_hf, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="quantization=8bit needs a CUDA device"):
        built(folder("bert"), quantization="8bit")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


COMMIT = "0123456789" * 4
WAYS_OUT = "backbone.weights=FOLDER.*or fill the cache.*HF_HOME"


def test_without_a_network_and_a_cache_both_ways_out_are_named(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"google/x is no folder here.*cannot be fetched.*{WAYS_OUT}"):
        HF(name="google/x").build(2, 0)
    assert time.monotonic() - started < 10  # the contract's limit, not a measurement


def test_a_missing_model_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from coeft.cli.main import main
code = main(["train", "backbone=minilm", "data=digits", "run_dir={tmp_path / "run"}"])
heavy = {{"torch", "transformers", "numpy"}} & set(sys.modules)
assert code == 2 and not heavy, (code, heavy)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "HF_HUB_OFFLINE is set" in run.stderr and not (tmp_path / "run").exists()


def test_a_silent_network_is_given_up(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hf_source, "NETWORK_SECONDS", 0.1)
    monkeypatch.setattr(_network.in_time, "__defaults__", (0.2,))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    with pytest.raises(UserError, match=f"no answer within.*{WAYS_OUT}"):
        HF(name="google/x").build(2, 0)


def test_offline_mode_asks_nobody(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set.*{WAYS_OUT}"):
        HF(name="google/x").build(2, 0)


def test_a_filled_cache_needs_no_network(folder: Any, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("asked the network"))
    repository = empty_cache / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder("bert"), repository / "snapshots" / COMMIT)
    backbone = HF(name="someone/tiny").build(2, 0)
    assert backbone.name == "someone/tiny" and len(backbone.sites) == 2
    HF(name="someone/tiny", revision=COMMIT).build(0, 0)


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_of_transformers_are_settings(file: Path) -> None:
    fields = yaml.safe_load(file.read_text())
    if fields["kind"] == "hf" and file.stem != "hf":
        assert HF(**fields).name.count("/") == 1
        assert "not verified here" in file.read_text().splitlines()[0]


def test_minilm_loads_with_its_tokenizer() -> None:
    backbone = built(minilm(), 2)
    assert [site.num_heads for site in backbone.sites] == [12] * 6 and len(backbone.blocks) == 6
    assert backbone.drawn == () and backbone.tokenizer.pad_token == "[PAD]"
    texts = ["a film that I liked", "no"]
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True)
    plain = transformers.BertForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()
    for name, parameter in backbone.head_parameters().items():
        plain.get_parameter(name).data.copy_(parameter)
    with torch.no_grad():
        assert torch.equal(backbone.forward(batch), plain(**batch).logits)


def test_an_adapter_restores_what_was_drawn_with_the_head(folder: Any, tmp_path: Path) -> None:
    model = changed(folder("bert"), tmp_path / "model", state=without("pooler"))
    backbone = built(model, 4)
    base = fingerprint(backbone.model, backbone.heads)
    stack = Stack({"coeff": Coeff(), "bitfit": BitFit()})
    stack.attach(backbone, 0)
    draw = torch.Generator().manual_seed(0)
    for parameters in [*stack.parameters().values(), backbone.head_parameters()]:
        for parameter in parameters.values():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    save_adapter(tmp_path / "adapter", backbone, stack, base=base, num_outputs=4, class_names=list("abcd"), card="")
    inputs = tiny_inputs("bert")
    plain = transformers.BertForSequenceClassification.from_pretrained(model)  # two labels, another pooler
    with torch.no_grad():
        backbone.model.eval()
        restored = coeft.load_adapter(plain, tmp_path / "adapter")
        assert torch.equal(restored(**inputs).logits, backbone.forward(inputs))


def test_the_code_of_a_model_card_builds_the_same_model(folder: Any) -> None:
    settings = HF(name="someone/bert", weights=str(folder("bert")), dtype="bf16", options={"hidden_dropout_prob": 0.2})
    code = settings.code()
    assert code.endswith(f"\n# {folder('bert').name}: the path of your copy") and str(folder("bert").parent) not in code
    space: dict[str, Any] = {}
    exec(code.replace(folder("bert").name, str(folder("bert"))), space)
    expected = settings.build(0, 0)
    assert space["model"].dtype == torch.bfloat16 and space["model"].config.hidden_dropout_prob == 0.2
    assert fingerprint(space["model"], "classifier") == fingerprint(expected.model, "classifier")
