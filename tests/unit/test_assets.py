"""The weights that the package carries are those of their record."""

import hashlib
import json
from importlib.resources import files

import torch

from coeft.backbones.timm import Timm
from coeft.cli.compose import compose


def test_the_record_is_of_these_weights() -> None:
    folder = files("coeft.assets")
    record = json.loads((folder / "vit_mini_fashion_mnist.json").read_text(encoding="utf-8"))
    weights = (folder / record["weights"]).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]
    assert len(weights) <= 6_000_000
    assert record["test_accuracy"] > 0.85


def test_the_preset_loads_them() -> None:
    settings = compose(["backbone=vit_mini"])[0].config.backbone
    assert isinstance(settings, Timm) and settings.pretrained
    trained = settings.build(num_classes=10, seed=0).model
    drawn = Timm(name=settings.name, options=settings.options, pretrained=False).build(num_classes=10, seed=0).model
    assert sum(p.numel() for p in trained.parameters()) == 1_212_426
    assert not torch.equal(trained.blocks[0].attn.qkv.weight, drawn.blocks[0].attn.qkv.weight)
