"""What trainer.precision chooses, what is stored in bf16, and every method with it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small import QUICK, coeft, lasting, results, trained
from tiny import tiny_backbone, tiny_images
from torch import nn

from coeft import precision
from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.methods.coeff import Coeff
from coeft.methods.lora import LoRA
from coeft.precision import choose, computing, store

CPU = torch.device("cpu")
METHODS = {"coeff": Coeff(), "lora": LoRA()}


def attached(*names: str) -> tuple[Backbone, Stack]:
    """A tiny ViT with a stack."""
    backbone, stack = tiny_backbone("vit"), Stack({name: METHODS[name] for name in names})
    stack.attach(backbone, 0)
    return backbone, stack


def test_auto_is_bf16_where_it_is_fast_and_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = nn.Linear(1000, 1000), nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(2)))
    large[1].weight = nn.Parameter(large[1].weight.detach())
    for native in (True, False):
        monkeypatch.setattr(precision, "multiplies_bf16", lambda native=native: native)
        assert choose("auto", small) == "fp32"
        assert choose("auto", large) == ("bf16" if native else "fp32")
        assert choose("bf16", small) == "bf16" and choose("fp32", large) == "fp32"
    large[1].weight = large[0].weight  # shared, so that there is only one
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    assert choose("auto", large) == "fp32"


def test_frozen_weights_of_layers_that_multiply_are_stored_in_bf16_once() -> None:
    backbone, stack = attached("lora")
    names = dict(backbone.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    store(backbone)
    kept = {name: parameter.data_ptr() for name, parameter in names.items()}
    for name, parameter in names.items():
        multiplied = name.endswith((".weight", ".bias")) and ("proj" in name or "qkv" in name or "fc" in name)
        assert (parameter.dtype == torch.bfloat16) == multiplied, name
        assert torch.equal(parameter, before[name].to(parameter.dtype))
    assert all(p.dtype == torch.float32 for owned in stack.parameters().values() for p in owned.values())
    assert all(p.dtype == torch.float32 for p in backbone.head_parameters().values())
    store(backbone)
    assert kept == {name: parameter.data_ptr() for name, parameter in names.items()}


def test_a_weight_that_is_also_looked_up_stays() -> None:
    backbone = attached()[0]
    first, second = (block.mlp.fc1 for block in backbone.model.blocks)
    backbone.model.table = nn.Embedding.from_pretrained(first.weight)
    backbone.model.table.weight = first.weight
    store(backbone)
    assert first.weight.dtype == torch.float32
    assert first.bias.dtype == second.weight.dtype == torch.bfloat16


def test_stored_weights_give_the_bits_of_casting_in_every_step() -> None:
    for methods in ((), ("lora",), ("coeff", "lora")):
        cast, stored = attached(*methods)[0], attached(*methods)[0]
        with computing("bf16", CPU):
            wanted = cast.model.forward_features(tiny_images("vit"))
            store(stored)
            found = stored.model.forward_features(tiny_images("vit"))
        assert torch.equal(wanted, found) and wanted.dtype == torch.float32


def test_the_head_is_in_float32() -> None:
    backbone, _ = attached("lora")
    store(backbone)
    with computing("bf16", CPU):
        features = backbone.model.forward_head(backbone.model.forward_features(tiny_images("vit")), pre_logits=True)
        logits = backbone.model(tiny_images("vit"))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, nn.functional.linear(features.float(), *backbone.model.head.parameters()))


BF16 = ["trainer.precision=bf16", "peft=[coeff,lora]", "trainer.max_epochs=1", "data.n_train=100"]


def test_a_run_in_bf16_repeats_resumes_and_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    once = trained(tmp_path / "a", *BF16, "cv.folds=2")
    again = trained(tmp_path / "b", *BF16, "cv.folds=2")
    assert lasting(once) == lasting(again)
    exact = trained(tmp_path / "c", "peft=[coeff,lora]", "cv.folds=2", *BF16[2:])
    assert once["heldout"]["loss"] != exact["heldout"]["loss"]
    for name in ("adapter_model.safetensors", "coeff/adapter_model.safetensors", "head.safetensors"):
        first, second = (tmp_path / run / "fold_1" / "adapter" / name for run in "ab")
        assert first.read_bytes() == second.read_bytes()
        with safe_open(first, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}
    (tmp_path / "b" / "results.json").unlink()
    (tmp_path / "b" / "fold_1" / "fold.json").unlink()
    assert coeft("resume", tmp_path / "b") == 0
    assert results(tmp_path / "b")["folds"] == once["folds"]
    capsys.readouterr()
    assert coeft("eval", tmp_path / "a") == 0
    assert f"{once['value']:.4f}" in capsys.readouterr().err


def test_an_exported_model_has_the_type_of_its_base(tmp_path: Path) -> None:
    assert coeft("train", *QUICK, *BF16, f"run_dir={tmp_path / 'run'}") == 0
    assert coeft("export", "model", tmp_path / "run", "--out", tmp_path / "model") == 0
    [file] = (tmp_path / "model").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float32}
