"""Methods that train weights the model has already."""

import pytest
import timm
import torch
from torch import nn

from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone, Preprocessing
from coeft.errors import UserError
from coeft.methods.bitfit import BitFit
from coeft.methods.full import Full
from coeft.methods.lora import LoRA

PREPROCESSING = Preprocessing(
    image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]


def backbone_of(model: nn.Module) -> Backbone:
    blocks = ["blocks.0", "blocks.1"]
    return Backbone(name="test_model", kind="timm", model=model, preprocessing=PREPROCESSING, blocks=blocks)


def vit(name: str = "vit_tiny_patch16_224") -> Backbone:
    torch.manual_seed(0)
    return backbone_of(timm.create_model(name, **VIT).eval())


def names(backbone: Backbone, **methods: object) -> list[str]:
    stack = Stack(methods)
    stack.attach(backbone, 0)
    return list(stack.attachments[-1].parameters)


def test_bitfit_trains_every_bias_outside_of_the_head() -> None:
    biases = [f"blocks.{i}.{layer}.bias" for i in range(2) for layer in BLOCK]
    assert names(vit(), bitfit=BitFit()) == ["patch_embed.proj.bias", *biases, "norm.bias"]
    assert names(vit(), bitfit=BitFit(layers=[-1])) == biases[6:]
    assert names(vit(), lora=LoRA(target_modules=["."]), bitfit=BitFit(layers=[0])) == biases[:6]


def test_bitfit_trains_the_q_and_v_biases_of_beit_but_no_position_table() -> None:
    found = names(vit("beit_base_patch16_224"), bitfit=BitFit(layers=[0]))
    layers = [
        "norm1.bias",
        "attn.q_bias",
        "attn.v_bias",
        "attn.proj.bias",
        "norm2.bias",
        "mlp.fc1.bias",
        "mlp.fc2.bias",
    ]
    assert sorted(found) == sorted(f"blocks.0.{layer}" for layer in layers)


def test_bitfit_without_biases_is_an_error() -> None:
    bare = nn.Sequential(nn.Linear(3, 3, bias=False))
    bare.add_module("head", nn.Linear(3, 2))
    with pytest.raises(UserError, match="peft.bitfit: test_model has no bias outside of the head"):
        names(backbone_of(bare), bitfit=BitFit())
    backbone = vit()
    backbone.blocks.append("blocks.1.attn.q_norm")
    with pytest.raises(UserError, match=r"the blocks of peft.bitfit.layers=\[2\] of test_model has no bias"):
        names(backbone, bitfit=BitFit(layers=[2]))


def test_full_trains_everything_outside_of_the_head_or_in_the_chosen_blocks() -> None:
    expected = [name for name, _ in vit().model.named_parameters() if not name.startswith("head.")]
    assert names(vit(), full=Full()) == expected and len(expected) == 4 + 2 * 12 + 2
    assert names(vit(), full=Full(layers=[1])) == [name for name in expected if name.startswith("blocks.1.")]


class Tied(nn.Module):
    """Two names of one weight, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.b.weight = self.a.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.b(self.a(x))))


def test_full_packs_shared_weights_and_running_statistics() -> None:
    backbone, stack = backbone_of(Tied()), Stack({"full": Full()})
    stack.attach(backbone, 0)
    x = torch.randn(8, 3)
    backbone.model.double().float()  # replaces the buffers, as a move to a device does
    backbone.model.train()(x).sum().backward()
    torch.optim.SGD(backbone.model.parameters(), lr=0.1).step()
    config, tensors = stack.attachments[0].pack()
    assert config["peft_type"] == "COEFT_FULL"
    assert not any("head" in name for name in tensors)
    assert tensors["base_model.model.norm.num_batches_tracked"] == 1

    fresh = backbone_of(Tied())
    fresh.model.head.load_state_dict(backbone.model.head.state_dict())
    stack.attach(fresh, 0)
    stack.attachments[0].unpack(config, tensors)
    assert torch.equal(fresh.model.eval()(x), backbone.model.eval()(x))


@pytest.mark.parametrize(("kind", "settings"), [("bitfit", BitFit()), ("full", Full())])
def test_unpack_names_what_does_not_fit(kind: str, settings: BitFit | Full) -> None:
    stack = Stack({kind: settings})
    stack.attach(vit(), 0)
    unpack, (config, tensors) = stack.attachments[0].unpack, stack.attachments[0].pack()
    key = "base_model.model.norm.bias"
    with pytest.raises(UserError, match=f"peft.{kind}: the adapter does not fit: {key} is missing"):
        unpack(config, {name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(UserError, match="base_model.model.head.bias is unexpected"):
        unpack(config, {**tensors, "base_model.model.head.bias": torch.zeros(5)})
    with pytest.raises(UserError, match=rf"{key} is \[7\], not \[48\]"):
        unpack(config, {**tensors, key: torch.zeros(7)})
    with pytest.raises(UserError, match=f"peft_type 'LORA', not COEFT_{kind.upper()}"):
        unpack({"peft_type": "LORA"}, tensors)
