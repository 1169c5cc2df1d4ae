"""trainer.strategy=fsdp: what is divided among processes, and that the model computes as before."""

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import following
import pytest
import tiny
import tiny_hf
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from coeft import ranks, sharding
from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.backbones._hf import describe
from coeft.config import Trainer, method_settings, methods_by_name, preset, settings_class
from coeft.errors import UserError
from coeft.methods.coeff import Coeff
from coeft.methods.full import Full
from coeft.methods.lora import LoRA

Case = tuple[Backbone, Stack, Callable[[], Tensor]]
"""A model with its stack, and its forward."""


class Module(nn.Module):
    """What sharding needs of a TuningModule."""

    def __init__(self, backbone: Backbone, stack: Stack) -> None:
        super().__init__()
        self.model, self.backbone, self.stack = backbone.model, backbone, stack

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone.forward(batch)


def gathered(model: nn.Module, names: list[str]) -> int:
    """How many of these weights are whole now."""
    return sum(not isinstance(model.get_parameter(name), DTensor) for name in names)


def step(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients in training mode, always with the same dropout."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = run()
    output.float().square().mean().backward()
    return output.detach().clone(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def computes_as_before(case: Case) -> None:
    """Both processes come to what each came to by itself, each with half of the frozen weights."""
    backbone, stack, run = case
    model, draw = backbone.model, torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from starts at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    outputs, gradients = step(model, run)
    found = sharding.units(backbone, stack, 2)
    names = {name for unit in found for name in unit.parameters}
    count = sum(parameter.numel() for unit in found for parameter in unit.parameters.values())
    memory = [StorageWeakRef(p.untyped_storage()) for unit in found for p in unit.parameters.values()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    modules = [unit.module for unit in found[:-1] if unit.parameters]
    blocks = [next(iter(unit.parameters)) for unit in found[:-1] if unit.parameters]  # a weight of each
    del found, parameter  # which hold weights
    sharding.shard(Module(backbone, stack))  # type: ignore[arg-type]
    gc.collect()
    assert all(reference.expired() for reference in memory), "something still holds whole weights"
    local = sum(p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor))
    assert {name for name, p in model.named_parameters() if isinstance(p, DTensor)} == names
    sums = torch.tensor([local])
    dist.all_reduce(sums)
    assert int(sums) == count and abs(local - count / 2) < 0.05 * count and count > 0.3 * frozen
    most = [0, 0]

    def watch(place: int) -> Callable[..., None]:
        def note(*args: Any) -> None:
            most[place] = max(most[place], gathered(model, blocks))

        return note

    handles = [module.register_forward_hook(watch(0), prepend=True) for module in modules]
    handles += [p.register_hook(watch(1)) for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FSDP2")  # a view as output, which may not be changed in place
            again, others = step(model, run)
        torch.testing.assert_close(again, outputs)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-6)
    assert most[0] == 1 and most[1] <= 2, "blocks must be gathered one after the other"
    for handle in handles:
        handle.remove()
    assert gathered(model, blocks) == 0
    assert all(tensor.shape == model.get_parameter(name).shape for name, tensor in model.state_dict().items()
               if name in names)  # fmt: skip


def in_two(body: Callable[[], None], folder: Path) -> None:
    """Run the body in two processes that have joined."""

    def follow(config: Any, folder: Path, join: Callable[[], None]) -> None:
        join()
        body()

    with pytest.MonkeyPatch.context() as patch:
        following.fork(patch)
        with ranks.several(SimpleNamespace(trainer=Trainer(devices=2)), folder, follow):
            body()


def compute_as_before(cases: Callable[[], Iterator[Case]], folder: Path) -> None:
    """The same as computes_as_before for each case."""

    def body() -> None:
        for case in cases():
            computes_as_before(case)

    in_two(body, folder)


METHODS = [name for name in methods_by_name() if "kind" in preset(name) and name not in ("hf", "full")]


def of_method(name: str) -> Case:
    """A method with its defaults, after what it needs before it."""
    follows = settings_class("peft", preset(name)["kind"]).follows
    chosen = [*([follows] if follows else []), name]
    backbone = tiny.tiny_backbone("vit", embed_dim=48)
    stack = Stack({each: method_settings(each, preset(each), f"conf/peft/{each}.yaml") for each in chosen})
    stack.attach(backbone, 0)
    images = tiny.tiny_images("vit")
    stack.calibrate(
        backbone, lambda batches, size: [images], lambda batch: backbone.model(batch).square().mean(), seed=0
    )
    return backbone, stack, lambda: backbone.model(images)


QUICK = ["ether", "bone", "spt"]  # of each way to act on frozen weights


def test_methods_that_read_frozen_weights_train_as_before(tmp_path: Path) -> None:
    compute_as_before(lambda: map(of_method, QUICK), tmp_path)


@pytest.mark.slow
def test_every_method_trains_as_before(tmp_path: Path) -> None:
    compute_as_before(lambda: (of_method(name) for name in METHODS if name not in QUICK), tmp_path)


def of_timm(family: str) -> Case:
    backbone, stack = tiny.tiny_backbone(family), Stack({"coeff": Coeff()})
    stack.attach(backbone, 0)
    return backbone, stack, lambda: backbone.model(tiny.tiny_images(family))


def of_hf(family: str, *, checkpointing: bool = False, mixed: bool = False, **options: Any) -> Case:
    model: Any = tiny_hf.tiny_model(family, "sdpa" if tiny_hf.FAMILIES[family].sdpa else "eager", **options)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    backbone = describe(model)
    if mixed:  # norms stay in float32
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.bfloat16()
    names = [name for name, module in model.named_modules() if name.endswith("q_proj")]
    stack = Stack({"coeff": Coeff()} | ({"dora": LoRA(dora=True, target_modules=["q_proj"])} if names else {}))
    stack.attach(backbone, 0)
    inputs: dict[str, Any] = tiny_hf.tiny_inputs(family)
    if tiny_hf.FAMILIES[family].kind == "causal":
        inputs["use_cache"] = False

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return tiny_hf.result(model, inputs)

    return backbone, stack, run


def test_tied_checkpointed_and_mixed_weights_train_as_before(tmp_path: Path) -> None:
    def cases() -> Iterator[Case]:
        yield of_hf("llama", tie_word_embeddings=True, checkpointing=True)
        yield of_hf("llama", mixed=True)
        yield of_timm("swin")  # blocks that give views

    compute_as_before(cases, tmp_path)


@pytest.mark.slow
def test_families_of_timm_train_as_before(tmp_path: Path) -> None:
    compute_as_before(lambda: map(of_timm, tiny.FAMILIES), tmp_path)


@pytest.mark.slow
def test_families_of_transformers_train_as_before(tmp_path: Path) -> None:
    compute_as_before(lambda: map(of_hf, tiny_hf.FAMILIES), tmp_path)


def attached(**settings: Any) -> tuple[Backbone, Stack]:
    backbone, stack = tiny.tiny_backbone("vit"), Stack(settings)
    stack.attach(backbone, 0)
    return backbone, stack


def names(backbone: Backbone, stack: Stack, processes: int) -> list[set[str]]:
    return [set(unit.parameters) for unit in sharding.units(backbone, stack, processes)]


def test_frozen_weights_are_divided_by_blocks() -> None:
    backbone, stack = attached(lora=LoRA())
    first, second, outside = names(backbone, stack, 2)
    assert first == {name.replace("blocks.1", "blocks.0") for name in second} and len(first) == 12
    assert "blocks.0.attn.qkv.weight" in first and not any("lora" in name for name in first)
    assert outside == {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    # the class token and position embeddings have one row, the head is trained
    assert not names(backbone, stack, 25)[2] and "blocks.0.attn.qkv.weight" in names(backbone, stack, 25)[0]


def test_weights_of_several_blocks_stay_whole() -> None:
    backbone, stack = attached()
    blocks: Any = backbone.model.blocks
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight
    first, second, _ = names(backbone, stack, 2)
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"}.isdisjoint(first | second)
    assert "blocks.0.mlp.fc1.bias" in first


def test_what_a_process_holds() -> None:
    backbone, stack = attached(lora=LoRA())
    sizes = [sum(p.numel() * 4 for p in unit.parameters.values()) for unit in sharding.units(backbone, stack, 2)]
    every = sum(p.numel() * 4 for p in backbone.model.parameters())
    assert sharding.resident(backbone, stack, 2) == every - sum(sizes) // 2 + sum(
        sizes
    )  # of two blocks both may be there
    assert sharding.resident(backbone, stack, 20) < sharding.resident(backbone, stack, 2)


def test_what_cannot_be_divided_is_refused() -> None:
    def refused(backbone: Backbone, stack: Stack) -> str:
        with pytest.raises(UserError, match=r"^trainer\.strategy=fsdp .*take ddp") as error:
            sharding.units(backbone, stack, 2)
        return str(error.value)

    backbone, stack = attached(full=Full())
    assert "[full] freezes none" in refused(backbone, stack)
    backbone, stack = attached()
    backbone.blocks = []
    assert "of which vit_tiny_patch16_224 has none" in refused(backbone, stack)
    backbone, stack = attached()
    layer: Any = backbone.model.get_submodule("blocks.1.mlp.fc1")
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert "no quantised weights (blocks.1.mlp.fc1.weight)" in refused(backbone, stack)
    backbone = describe(tiny_hf.tiny_model("opt", layerdrop=0.1))
    stack = Stack({})
    stack.attach(backbone, 0)
    assert "layerdrop" in refused(backbone, stack)


def test_weights_that_are_read_outside_of_their_blocks_are_told(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) + x.mean() * self.model.get_parameter("blocks.0.attn.proj.weight")[0, 0]

    def body() -> None:
        backbone, stack = attached()
        backbone.model = Reads(backbone.model)
        backbone.blocks = [f"model.{name}" for name in backbone.blocks]
        backbone.head = "model.head"
        stack.attach(backbone, 0)
        module: Any = Module(backbone, stack)
        batch = {"pixel_values": torch.zeros(2, 3, 32, 32)}
        sharding.check_forward(module, batch)
        sharding.shard(module)
        with pytest.raises(UserError, match=r"reads weights of its blocks outside of them \(.*DTensor"):
            sharding.check_forward(module, batch)

    in_two(body, tmp_path)
