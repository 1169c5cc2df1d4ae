"""Building timm backbones: names, weights, sizes, seeds and what a user can do wrong."""

import logging
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import SWIN, VIT

from coeft.backbones.timm import Timm
from coeft.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "backbone"
NAME = "vit_tiny_patch16_224"
VIT_MINI = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 6, "num_heads": 8}


def small(**changes: Any) -> Timm:
    return Timm(**({"name": NAME, "pretrained": False, "options": VIT} | changes))


def weights(folder: Path, model: torch.nn.Module, **extra: torch.Tensor) -> Path:
    file = folder / "weights.safetensors"
    save_file({k: v.clone() for k, v in (model.state_dict() | extra).items()}, file)
    return file


def test_a_backbone_states_its_facts() -> None:
    backbone = small().build(10, seed=3)
    assert (backbone.name, backbone.kind, backbone.head) == (NAME, "timm", "head")
    assert backbone.blocks == ["blocks.0", "blocks.1"]
    assert [site.name for site in backbone.sites] == ["blocks.0.attn", "blocks.1.attn"] and backbone.refusal is None
    assert backbone.model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert set(backbone.head_parameters()) == {"head.weight", "head.bias"}
    look = backbone.preprocessing
    assert (look.image_size, look.mean, look.std) == ((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert (look.interpolation, look.crop_pct, look.resize) == ("bicubic", 0.9, "crop")


@pytest.mark.parametrize(
    ("name", "head", "blocks", "size", "mean"),
    [
        ("vit_small_patch14_dinov2", "head", 12, 518, 0.485),
        ("swinv2_tiny_window8_256", "head.fc", 12, 256, 0.485),
        ("vit_base_patch16_siglip_224", "head", 12, 224, 0.5),
        ("cait_xxs24_224", "head", 26, 224, 0.485),
        ("resnet18", "fc", 8, 224, 0.485),
    ],
)
def test_facts_of_families(name: str, head: str, blocks: int, size: int, mean: float) -> None:
    with torch.device("meta"):
        backbone = Timm(name=name, pretrained=False).build(0, seed=0)
    assert (backbone.head, len(backbone.blocks)) == (head, blocks)
    assert backbone.preprocessing.image_size == (size, size) and backbone.preprocessing.mean[0] == mean


def test_random_weights_and_head_follow_from_the_seed_alone() -> None:
    first, second = small().build(10, 3).model, small().build(10, 3).model
    other, bigger = small().build(10, 4).model, small().build(11, 3).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    weight = "blocks.0.attn.qkv.weight"
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))
    assert not torch.equal(first.get_parameter("head.weight"), other.get_parameter("head.weight"))
    assert torch.equal(first.get_parameter(weight), bigger.get_parameter(weight))


def test_a_late_head_is_the_same_head() -> None:
    early, late = small().build(10, 3), small().build(0, 3)
    assert late.head_parameters() == {}
    late.new_head(10, 3)
    assert torch.equal(early.model.get_parameter("head.weight"), late.model.get_parameter("head.weight"))


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested"])
def test_weights_of_a_file(tmp_path: Path, form: str) -> None:
    source = small().build(0, seed=1).model
    if form == "safetensors":
        file = weights(tmp_path, source)
    else:
        file = tmp_path / "weights with spaces é.pth"
        torch.save(source.state_dict() if form == "pth" else {"state_dict": source.state_dict(), "epoch": 3}, file)
    got = small(pretrained=True, weights=str(file)).build(10, seed=2).model
    for name, parameter in source.named_parameters():
        assert torch.equal(got.get_parameter(name), parameter), name
    assert torch.equal(got.head.weight, small().build(10, seed=2).model.head.weight)  # type: ignore[union-attr]
    assert "state_dict" not in got.pretrained_cfg  # type: ignore[operator]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path, small().build(0, seed=1).model)
    monkeypatch.setenv("HOME", str(tmp_path))
    small(pretrained=True, weights="~/weights.safetensors").build(10, seed=2)


def test_a_classifier_in_the_file_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = small().build(7, seed=1).model
    with caplog.at_level(logging.WARNING, "coeft"):
        backbone = small(pretrained=True, weights=str(weights(tmp_path, source))).build(10, seed=2)
    assert "head.weight [7, 24]" in caplog.text and "head.bias [7]" in caplog.text
    assert "is dropped; the task gets a fresh one" in caplog.text
    assert backbone.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_weights_in_another_projects_format_go_through_timms_conversion(tmp_path: Path) -> None:
    """Swin's own checkpoints downsample at the end of a stage, and call the classifier head, not head.fc."""
    settings = Timm(name="swin_tiny_patch4_window7_224", pretrained=False, options=SWIN)
    source = settings.build(7, seed=1).model
    state = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value.clone()
        for name, value in source.state_dict().items()
    }
    assert "layers.0.downsample.reduction.weight" in state and "head.weight" in state
    save_file(state, tmp_path / "w.safetensors")
    again = Timm(name=settings.name, weights=str(tmp_path / "w.safetensors"), options=SWIN)
    loaded = again.build(0, seed=2).model
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)), name
    del state["norm.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit swin_tiny_patch4_window7_224: norm.bias is missing$"):
        again.build(0, seed=2)


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
def test_position_embeddings_are_resampled_to_another_image_size(tmp_path: Path, family: str) -> None:
    options = VIT | {"img_size": 64}
    source = Timm(name=family, pretrained=False, options=options).build(0, seed=1).model
    with torch.no_grad():  # a ramp from left to right, which resampling keeps
        grid = source.get_parameter("pos_embed")[:, -64:].view(1, 8, 8, 24)
        grid.copy_(torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand_as(grid))
    file = weights(tmp_path, source)
    backbone = Timm(name=family, weights=str(file), options=options).build(5, seed=2, image_size=32)
    assert backbone.preprocessing.image_size == (32, 32)
    assert backbone.model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    ramp = backbone.model.get_parameter("pos_embed")[0, -16:].view(4, 4, 24)
    torch.testing.assert_close(ramp, ramp[:1, :, :1].expand_as(ramp))
    assert (ramp[0].diff(dim=0) > 0.3).all() and abs(ramp.mean()) < 1e-4


def test_an_image_size_of_height_and_width() -> None:
    backbone = small().build(5, seed=0, image_size=(32, 64))
    assert backbone.preprocessing.image_size == (32, 64)
    assert backbone.model(torch.zeros(1, 3, 32, 64)).shape == (1, 5)


def test_convolutional_models_take_any_size() -> None:
    backbone = Timm(name="test_resnet", pretrained=False).build(5, seed=0, image_size=72)
    assert backbone.preprocessing.image_size == (72, 72)
    assert backbone.model(torch.zeros(1, 3, 72, 72)).shape == (1, 5)
    assert backbone.sites == [] and "no attention layers" in str(backbone.refusal)


@pytest.mark.parametrize(
    ("changes", "image_size", "message"),
    [
        ({"name": "vit_tiny_patch16_225"}, None, "no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
        ({"name": f"{NAME}.augreg_in22k"}, None, "no pre-trained tag 'augreg_in22k'; did you mean augreg_in21k"),
        ({"name": "hf-hub:timm/x"}, None, "timm has no model 'hf-hub:timm/x'"),
        ({"options": {"embed_dims": 3}}, None, "vit_tiny_.* has no option 'embed_dims'; did you mean embed_dim"),
        ({"options": VIT | {"num_heads": 5}}, None, "timm cannot build vit_tiny_.* with .*num_heads=5.*divisible"),
        ({}, 30, "30 x 30 pixels are not a multiple of the patches of vit_tiny_patch16_224, 8 x 8"),
        ({}, 0, "data.image_size must be a number of pixels"),
        ({}, (1, 2, 3), "data.image_size must be a number of pixels, or height and width"),
        ({"name": "deit_tiny_distilled_patch16_224", "options": {}}, None, r"several classifiers \(head, head_dist\)"),
    ],
)
def test_mistakes_are_named(changes: dict, image_size: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**changes).build(10, 0, image_size)


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="backbone.name is missing"):
        Timm()
    with pytest.raises(UserError, match="backbone.options: checkpoint_path, num_classes cannot be set here"):
        small(options={"num_classes": 3, "checkpoint_path": "x"})


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("touch run-by-a-pickle",)


def test_files_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = small().build(0, seed=1).model
    state = {name: value.clone() for name, value in source.state_dict().items()}

    def refused(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            small(pretrained=True, weights=name).build(10, 0)

    lacking = {k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}
    save_file(lacking, "lacking.safetensors")
    refused("lacking.safetensors", "lacking.safetensors does not fit vit_tiny.*: blocks.1.mlp.fc1.bias is missing$")
    save_file(state | {"blocks.2.norm1.weight": torch.zeros(24)}, "deep.safetensors")
    refused("deep.safetensors", "blocks.2.norm1.weight is unexpected")
    save_file(state | {"norm.weight": torch.zeros(25)}, "wide.safetensors")
    refused("wide.safetensors", r"norm.weight is \[25\], not \[24\]")
    save_file({"head.weight": torch.zeros(3, 24)}, "head.safetensors")
    refused("head.safetensors", "holds a classifier only")
    Path("cut.safetensors").write_bytes(Path("deep.safetensors").read_bytes()[:5000])
    refused("cut.safetensors", "neither a whole safetensors file nor a torch state dict")
    torch.save(state, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    refused("cut.pth", "neither a whole safetensors file nor a torch state dict")
    torch.save({"state_dict": Code()}, "code.pth")
    refused("code.pth", "coeft runs no code from weight files")
    Path("old.bin").write_bytes(pickle.dumps(Code()))
    refused("old.bin", "coeft runs no code from weight files")
    assert not Path("run-by-a-pickle").exists()
    torch.save({"lr": 3}, "numbers.pth")
    refused("numbers.pth", "holds no state dict of tensors")
    Path("text.pth").write_text("hello")
    refused("text.pth", "text.pth (holds more than tensors|is neither)")
    refused("absent.safetensors", "there is no file absent.safetensors")
    refused(".", "is a folder")
    refused("package://absent.safetensors", "coeft ships no package://absent.safetensors")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


WAYS_OUT = "backbone.weights=FILE.*or fill the cache.*HF_HOME"


def test_without_a_network_and_a_cache_both_ways_out_are_named(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    started = time.monotonic()
    for name in (NAME, "gcvit_tiny"):  # from the hub and from a plain address
        with pytest.raises(UserError, match=f"the weights of {name} .*cannot be fetched.*{WAYS_OUT}"):
            Timm(name=name).build(10, 0)
    assert time.monotonic() - started < 10  # the contract's limit, not a measurement


def test_a_silent_network_is_given_up(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coeft.backbones import _timm

    monkeypatch.setattr(_timm, "NETWORK_SECONDS", 0.1)
    monkeypatch.setattr(_timm.in_time, "__defaults__", (0.2,))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    with pytest.raises(UserError, match=f"no answer within.*{WAYS_OUT}"):
        Timm(name=NAME).build(10, 0)


def test_offline_mode_asks_nobody(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set.*{WAYS_OUT}"):
        Timm(name=NAME).build(10, 0)


def test_a_filled_cache_needs_no_network(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("asked the network"))
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=1000)
    repository = empty_cache / "hub" / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file(source.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    model = Timm(name="test_vit.r160_in1k").build(10, 0).model
    assert torch.equal(model.get_parameter("blocks.0.attn.qkv.weight"), source.blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match="timm's test_vit does not fit test_vit: blocks.6.norm1.weight is missing;"):
        Timm(name="test_vit", options={"depth": 7}).build(10, 0)  # no block starts at random unnoticed


def test_a_model_without_weights_in_timm() -> None:
    name = next(n for n in timm.list_models() if not timm.models.is_model_pretrained(n))
    with pytest.raises(UserError, match=f"timm has no pre-trained weights of {name}.*backbone.pretrained=false"):
        Timm(name=name).build(10, 0)


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_name_what_timm_has(file: Path) -> None:
    fields = yaml.safe_load(file.read_text())
    assert list(fields)[0] == "kind"
    if fields["kind"] != "timm" or file.stem == "timm":
        return
    settings = Timm(**fields)
    if settings.weights is None:
        assert settings.name in timm.list_pretrained()
        assert "." in settings.name, "the tag is pinned"
    else:
        assert timm.is_model(settings.name)


def test_the_mini_preset_builds_without_weights() -> None:
    fields = yaml.safe_load((CONF / "vit_mini.yaml").read_text())
    assert fields["options"] == VIT_MINI
    backbone = Timm(**(fields | {"pretrained": False})).build(10, 0)
    assert backbone.preprocessing.image_size == (28, 28) and len(backbone.sites) == 6
    assert backbone.model(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
