"""What every PEFT method promises. The folders coeft/methods and conf/peft are the list: a new method, or a preset of a
tuner of peft, is tested by being there."""

import copy
import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coeft.adapt import Stack, count_parameters, merge
from coeft.attention.timm import find_sites
from coeft.backbones._backbone import Backbone, Preprocessing
from coeft.config import kinds, method_settings, methods_by_name, preset, settings_class
from coeft.precision import computing, store

KINDS = kinds("peft")
METHODS = [name for name in methods_by_name() if "kind" in preset(name) and name != "hf"]  # hf needs a type
DIM, DEPTH, HEADS = 48, 2, 3

# Trained numbers for the model below with default settings, by the formula on each method's card. A new method adds
# its own here; without it test_the_count_is_that_of_the_card fails.
WEIGHTS = DIM * 3 * 64 + DIM + 17 * DIM + DIM + 2 * DIM + DEPTH * (12 * DIM**2 + 13 * DIM)
COUNTS: dict[str, int | range] = {
    "coeff": DEPTH * HEADS**2,
    "lora": DEPTH * 8 * ((DIM + 3 * DIM) + (DIM + DIM)),
    "bitfit": DIM + DIM + DEPTH * 11 * DIM,
    "full": WEIGHTS,
    "diablo": DEPTH * 4 * DIM**2 // 8,
    "melora": DEPTH * 4 * 8 * 2 * DIM,
    "abba": DEPTH * (4 + 4) * ((DIM + 3 * DIM) + (DIM + DIM)),
    "ether": DEPTH * 4 * DIM,
    "ether_plus": DEPTH * 4 * 2 * (DIM + DIM),
    "svft": DEPTH * 2 * (3 * DIM - 2),
    "vectorfit": DEPTH * (2 * DIM + 3 * DIM + DIM),
    "fact": 2 * DIM * 16 + DEPTH * 4 * 16**2,
    "snell": DEPTH * 8 * ((DIM + 3 * DIM) + (DIM + DIM)),
    "map": DEPTH * 2 * 2,
    "kradapter": DEPTH * DIM * ((6 + 24) + (6 + 8)),  # rank 6 = floor(sqrt 48); V has 24 and 8 columns
    # through peft
    "gralora": DEPTH * 8 * ((DIM + 3 * DIM) + (DIM + DIM)),
    "delora": DEPTH * (8 * ((DIM + 3 * DIM) + (DIM + DIM)) + 2),
    "miss": DEPTH * 16 * (3 * DIM + DIM),
    "bone": DEPTH * 16 * (3 * DIM + DIM),
    "road": DEPTH * (3 * DIM + DIM),
    "psoft": DEPTH * 2 * (32 * 31 // 2 + 2 * 32),
    "waveft": DEPTH * 2 * 1024,
    "adapter": DEPTH * 2 * (2 * 16 * DIM + 16 + DIM),
    "adalink": 2 * 16 * DIM,
    "loreft": DEPTH * (2 * 4 * DIM + 4),
    "nora": DEPTH * 3 * (10 + 2 * 8),
    "ssf": DIM * (22 * DEPTH + 4),
    "vpt": DEPTH * 10 * DIM,
    "neuroada": DEPTH * (3 * DIM + DIM),
    "paca": DEPTH * 8 * (3 * DIM + DIM),
    "shira": DEPTH * (round(0.02 * 3 * DIM**2) + round(0.02 * DIM**2)),
    "spt": range(1, round(0.01 * DEPTH * 4 * DIM**2) + 1),  # what the data make of the budget
    "sparse": DEPTH * (round(0.01 * 3 * DIM**2) + round(0.01 * DIM**2)),
}

# Methods that act on what others before them have done, with these; and those whose card says that they do not start
# at the pretrained model, with how far from its logits they may start.
AFTER = {kind: [cls.follows] for kind in kinds("peft") if (cls := settings_class("peft", kind)).follows}
STARTS_ELSEWHERE = {"ether": float("inf"), "nora": 0.02, "vpt": float("inf")}


def fresh() -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=5
    ).eval()
    sites, refusal = find_sites(model)
    return Backbone(
        name="vit_test",
        kind="timm",
        model=model,
        preprocessing=Preprocessing(
            image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
        ),
        sites=sites,
        refusal=refusal,
        blocks=[f"blocks.{i}" for i in range(DEPTH)],
    )


def defaults(name: str) -> Any:
    """The settings of a method as conf/peft/ has them."""
    return method_settings(name, preset(name), f"conf/peft/{name}.yaml")


def attached(*methods: str, seed: int = 0) -> tuple[Backbone, Stack]:
    names = dict.fromkeys(name for method in methods for name in (*AFTER.get(method, []), method))
    backbone, stack = fresh(), Stack({name: defaults(name) for name in names})
    stack.attach(backbone, seed)
    calibrate(backbone, stack, seed)
    return backbone, stack


def calibrate(backbone: Backbone, stack: Stack, seed: int) -> None:
    """What training does between attach and the optimizer, on the batches of `seed`."""

    def draw(batches: int, batch_size: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2)]

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(backbone.model(batch), torch.tensor([0, 1, 2, 3]))

    stack.calibrate(backbone, draw, loss, seed)


def images(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps of AdamW on random labels."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    torch.manual_seed(3)
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), labels).backward()
        optimizer.step()
    model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, each shared one once."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def test_the_folder_holds_the_promised_methods() -> None:
    assert {"coeff", "lora", "bitfit", "full"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_file_is_the_dataclass(kind: str) -> None:
    """conf/peft/KIND.yaml has `kind` first and then every field with its default, in the package peft.KIND."""
    text = (Path(__file__).parents[2] / "conf" / "peft" / f"{kind}.yaml").read_text()
    assert text.startswith(f"# @package peft.{kind}\nkind: {kind}\n")
    settings = settings_class("peft", kind)()
    assert yaml.safe_load(text) == dataclasses.asdict(settings)
    json.dumps(dataclasses.asdict(settings))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in KINDS])
def test_a_preset_has_every_setting_of_its_kind_and_a_card(name: str) -> None:
    path = Path(__file__).parents[2] / "conf" / "peft" / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())
    assert list(settings)[0] == "kind" and set(settings) == set(dataclasses.asdict(defaults(name)))
    card = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    assert card[0] == f"@package peft.{name}"
    for section in ("What it trains", "Start", "When to take it", "Source", "Departures", "Mergeable"):
        assert any(line.startswith(f"{section} ") for line in card), section


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_has_its_sections(kind: str) -> None:
    assert settings_class("peft", kind).family
    card = import_module(f"coeft.methods.{kind}").__doc__ or ""
    for section in ("What it trains", "Start", "When to take it", "Source", "Departures", "Checked against"):
        assert f"\n{section} " in card, section


@pytest.mark.parametrize("kind", METHODS)
def test_training_starts_at_the_pretrained_model_with_every_module_called(kind: str) -> None:
    backbone, stack = attached(kind)
    expected, output = fresh().model(images()), stack.probe(backbone, images())
    if kind in STARTS_ELSEWHERE:
        assert 1e-5 < (output - expected).abs().max() < STARTS_ELSEWHERE[kind]
        assert "NOT the pretrained" in (import_module(f"coeft.methods.{kind}").__doc__ or "")
    else:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert list(fresh().model.state_dict()) == [
        name for name in backbone.model.state_dict() if name in fresh().model.state_dict()
    ]


@pytest.mark.parametrize("kind", METHODS)
def test_the_count_is_that_of_the_card(kind: str) -> None:
    assert kind in COUNTS, f"add the number of parameters that {kind} trains to COUNTS"
    backbone, stack = attached(kind)
    count = count_parameters(backbone, stack)
    before = sum(cast(int, COUNTS[name]) for name in AFTER.get(kind, []))
    expected = COUNTS[kind] if isinstance(COUNTS[kind], range) else [COUNTS[kind]]
    assert count.adapter - before in expected and count.head == 5 * DIM + 5
    assert sum(row.parameters for row in stack.report()) == count.adapter
    assert count.total == sum(p.numel() for p in backbone.model.parameters())


@pytest.mark.parametrize("kind", METHODS)
def test_only_what_is_owned_moves_and_all_of_it(kind: str) -> None:
    backbone, stack = attached(kind)
    before = state(backbone.model)
    train(backbone.model)
    moving = {*set().union(*stack.parameters().values()), "head.weight", "head.bias"}
    for name, tensor in (*backbone.model.named_parameters(), *backbone.model.named_buffers()):
        if name in moving:
            assert not torch.equal(tensor, before[name]), f"{name} did not move"
        else:
            assert torch.equal(tensor, before[name]), f"{name} moved"


@pytest.mark.parametrize("kind", METHODS)
def test_saved_and_loaded_into_a_fresh_model_it_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    backbone, stack = attached(kind)
    train(backbone.model)
    earlier = [before.pack() for before in stack.attachments[:-1]]
    config, tensors = stack.attachments[-1].pack()
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert not any(name.startswith("base_model.model.head.") for name in tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    config = json.loads(json.dumps(config))

    again, other = attached(kind, seed=1)
    again.model.head.load_state_dict(backbone.model.head.state_dict())
    assert not torch.equal(again.model(images()), backbone.model(images()))
    for before, parts in zip(other.attachments[:-1], earlier, strict=True):
        before.unpack(*parts)
    other.attachments[-1].unpack(config, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(again.model(images()), backbone.model(images()))
    for name, tensor in tensors.items():
        assert torch.equal(other.attachments[-1].pack()[1][name], tensor)


@pytest.mark.parametrize("kind", METHODS)
def test_equal_seeds_give_equal_training(kind: str) -> None:
    first, _ = attached(kind)
    train(first.model)
    torch.manual_seed(77)
    second, _ = attached(kind)
    train(second.model)
    assert all(torch.equal(tensor, state(first.model)[name]) for name, tensor in state(second.model).items())


@pytest.mark.parametrize("kind", METHODS)
def test_merging_keeps_the_function_and_what_merges_leaves_a_plain_model(kind: str) -> None:
    backbone, stack = attached(kind)
    train(backbone.model)
    expected, merges = backbone.model(images()), stack.attachments[-1].merges
    assert merges == defaults(kind).merges
    left = merge(backbone, stack)
    assert left == ([] if merges else [kind])
    torch.testing.assert_close(backbone.model(images()), expected, rtol=1e-5, atol=1e-5)
    if merges:
        plain = fresh().model
        assert list(plain.state_dict()) == list(backbone.model.state_dict())
        plain.load_state_dict(backbone.model.state_dict())
        torch.testing.assert_close(plain(images()), expected, rtol=1e-5, atol=1e-5)
    assert merge(backbone, stack) == left


@pytest.mark.parametrize("kind", METHODS)
def test_bf16_and_no_samples_and_a_deep_copy(kind: str) -> None:
    backbone, _ = attached(kind)
    train(backbone.model)
    copied = copy.deepcopy(backbone.model)
    assert torch.equal(copied(images()), backbone.model(images()))
    assert backbone.model(images(0)).shape == (0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.model(images()).isfinite().all()
    base = fresh()
    base.model.bfloat16()
    Stack({name: defaults(name) for name in (*AFTER.get(kind, []), kind)}).attach(base, 0)
    output = base.model(images().bfloat16())
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind not in ("full", "bitfit", "coeff", "nora")])
def test_two_of_one_kind_stand_side_by_side_under_names_of_their_own(kind: str) -> None:
    """Not full, which stands alone, nor bitfit, coeff and nora, of which a layer holds one."""

    def both(seed: int) -> tuple[Backbone, Stack]:
        names = dict.fromkeys(AFTER.get(kind, []), "") | {kind: "", "second": ""}
        backbone, stack = fresh(), Stack({name: defaults(kind if name == "second" else name) for name in names})
        stack.attach(backbone, seed)
        calibrate(backbone, stack, seed)
        return backbone, stack

    backbone, stack = both(0)
    assert [a.method for a in stack.attachments] == list(stack.methods)
    train(backbone.model, 1)
    expected = backbone.model(images())
    parts = [a.pack() for a in stack.attachments]
    again, other = both(1)
    again.model.head.load_state_dict(backbone.model.head.state_dict())
    for theirs, ours in zip(other.attachments, parts, strict=True):
        theirs.unpack(*ours)
    assert torch.equal(again.model(images()), expected)
    stays = [a.method for a in stack.attachments if not a.merges]
    assert merge(backbone, stack) == stays
    torch.testing.assert_close(backbone.model(images()), expected, rtol=1e-4, atol=1e-4)


def test_several_methods_in_one_stack_train_merge_and_reload_together() -> None:
    methods = [name for name in METHODS if name != "full"]
    backbone, stack = attached(*methods)
    before = state(backbone.model)
    train(backbone.model)
    owned = set().union(*stack.parameters().values()) | {"head.weight", "head.bias"}
    moved = {name for name, tensor in state(backbone.model).items() if not torch.equal(tensor, before[name])}
    assert moved == owned

    again, other = attached(*methods, seed=1)
    again.model.head.load_state_dict(backbone.model.head.state_dict())
    for ours, theirs in zip(stack.attachments, other.attachments, strict=True):
        theirs.unpack(*ours.pack())
    expected = backbone.model(images())
    assert torch.equal(again.model(images()), expected)
    assert merge(backbone, stack) == [a.method for a in other.attachments if not a.merges]
    torch.testing.assert_close(backbone.model(images()), expected, rtol=1e-5, atol=1e-5)


def test_edits_see_the_base_model_alone_whatever_is_inside_its_layers() -> None:
    for before in ("gralora", "lora"):
        backbone, stack = attached(before, "ssf")
        assert {row.place for row in stack.report() if row.method == "ssf"} == {
            row.place for row in attached("ssf")[1].report()
        }
        train(backbone.model)
        expected = backbone.model(images())
        assert merge(backbone, stack) == []
        torch.testing.assert_close(backbone.model(images()), expected, rtol=1e-5, atol=1e-5)


def loss_and_gradients(kind: str, arithmetic: str) -> tuple[Any, dict[str, Any]]:
    """Of a stack whose parameters have left their start."""
    backbone, stack = attached(kind)
    generator = torch.Generator().manual_seed(5)
    owned = {name: p for parameters in stack.parameters().values() for name, p in parameters.items()}
    with torch.no_grad():
        for parameter in owned.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    if arithmetic == "bf16":
        store(backbone)
    backbone.model.eval()
    with computing(arithmetic, torch.device("cpu")):
        logits = backbone.model(images())
    loss = nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in owned.items()}


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_trains_over_weights_in_bf16(kind: str) -> None:
    """Loss and gradients are those of float32 up to the rounding of bf16; gradients are kept in float32."""
    wanted, gradients = loss_and_gradients(kind, "fp32")
    loss, found = loss_and_gradients(kind, "bf16")
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0.03)
    ours, theirs = [], []
    for name, gradient in gradients.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert found[name].dtype == torch.float32, name
            ours.append(found[name].flatten())
            theirs.append(gradient.flatten())
    assert nn.functional.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0) > 0.97


@pytest.mark.parametrize("kind", METHODS)
def test_adapters_of_models_in_bf16_are_in_float32(kind: str) -> None:
    backbone, stack = attached(kind)
    wanted = [attachment.pack()[1] for attachment in stack.attachments]
    store(backbone)
    for attachment, before in zip(stack.attachments, wanted, strict=True):
        found = attachment.pack()[1]
        assert found.keys() == before.keys()
        for name, tensor in found.items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_computes_and_learns_the_same(name: str) -> None:
    """Traced whole and differentiated by torch.compile; the code that a backend would generate is torch's affair."""
    backbone, stack = attached(name)
    train(backbone.model)
    backbone.model.zero_grad()
    expected = backbone.model(images())
    expected.square().sum().backward()
    gradients = [p.grad.clone() for owned in stack.parameters().values() for p in owned.values() if p.grad is not None]
    backbone.model.zero_grad()
    torch._dynamo.reset()
    output = torch.compile(backbone.model, backend="aot_eager")(images())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    found = [p.grad for owned in stack.parameters().values() for p in owned.values() if p.grad is not None]
    assert len(found) == len(gradients) > 0
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
