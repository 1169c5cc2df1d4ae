"""What a step takes is estimated without a trace, and what is free is the least of all limits."""

import resource
from pathlib import Path

import psutil
import pytest
import torch
from small import DIGITS, TINY

from coeft.assemble import Assembled
from coeft.cli.compose import compose
from coeft.memory import MIB, cgroup_rooms, free_memory, longest, probe, step_memory
from coeft.sharding import resident
from coeft.train import Prepared, prepare

RESNET = ["backbone=timm", "backbone.name=resnet10t", "backbone.pretrained=false", "data.image_size=32"]


def prepared(*overrides: str) -> tuple[object, Prepared]:
    [composition] = compose([*DIGITS, *overrides])
    return composition.config, prepare(composition.config)


def state(built: Assembled) -> list[torch.Tensor]:
    return [*built.module.state_dict().values(), torch.get_rng_state()]


def test_a_probe_leaves_no_trace() -> None:
    cfg, found = prepared(*RESNET, "peft=full")
    built = found.first
    built.module.model.eval()
    before = [value.clone() for value in state(built)]
    loss, per_sample = probe(built, longest(cfg, built, found.folds[0], 2))
    assert loss > 0 and per_sample > 0
    assert all(map(torch.equal, before, state(built)))  # running means of batches among them
    assert not any(module.training for module in built.module.model.modules())
    assert all(parameter.grad is None for parameter in built.module.parameters())


def test_a_step_is_gradients_moments_and_what_a_micro_batch_saves() -> None:
    cfg, found = prepared(*TINY, "peft=lora", "data.batch_size=32", "trainer.micro_batch_size=8")
    built, fold = found.first, found.folds[0]
    trained = sum(p.numel() * 4 for p in built.module.parameters() if p.requires_grad)
    saved: dict[int, int] = {}
    held = {p.untyped_storage().data_ptr() for p in built.module.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = fold.train.batch(range(8))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = built.module.task.loss(built.module(batch), batch, training=True)
        wanted = 3 * trained + sum(size for pointer, size in saved.items() if pointer not in held)
    assert loss.requires_grad
    assert step_memory(cfg, built, fold) == pytest.approx(wanted, rel=0.02)


def test_a_device_holds_its_share_of_divided_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["trainer.devices=2", "data.batch_size=32"]
    cfg, found = prepared(*TINY, "peft=lora", *two, "trainer.strategy=fsdp")
    whole, _ = prepared(*TINY, "peft=lora", *two)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    built, fold = found.first, found.folds[0]
    weights = sum(p.numel() * 4 for p in built.module.parameters())
    less = weights - resident(built.backbone, built.stack, 2)
    assert step_memory(whole, built, fold) - step_memory(cfg, built, fold) == less


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(version: int, tmp_path: Path) -> None:
    """usage without files that could be dropped, in the group or one above it; a group without a limit has none."""
    membership, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    membership.write_text("5:cpu:/other\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}[version]
    top = mounted / "memory" if version == 1 else mounted

    def group(path: Path, limit: str, usage: int, inactive: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / f"memory.{names[0]}").write_text(f"{limit}\n")
        (path / f"memory.{names[1]}").write_text(f"{usage}\n")
        (path / "memory.stat").write_text(f"cache 9\n{names[2]}inactive_file {inactive}\n")

    assert cgroup_rooms(membership, mounted) == []
    group(top / "a" / "b", "max" if version == 2 else str(2**63 - 4096), 50, 0)
    group(top / "a", "1000", 700, 100)
    assert min(cgroup_rooms(membership, mounted)) == 400
    group(top / "a" / "b", "100", 250, 0)
    assert min(cgroup_rooms(membership, mounted)) == 0
    assert cgroup_rooms(tmp_path / "none", mounted) == []


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_a_limit_on_the_address_space_counts() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MIB, before[1]))
    try:
        free = free_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 0 < free <= 64 * MIB
