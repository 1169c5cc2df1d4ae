"""The processes of a run: how many, how they are refused, and how the first one learns what became of the others."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import following
import psutil
import pytest
import torch
import torch.distributed as dist
from small import DIGITS, QUICK, TINY, coeft

from coeft import ranks
from coeft.config import Trainer
from coeft.errors import UserError
from coeft.interrupt import Interrupted


@pytest.mark.parametrize(
    "devices", [0, -1, True, 1.5, "2 GPUs", "all", [], [0, 0], [-1], ["cuda:0"], None, {"gpu": 1}], ids=str
)
def test_devices_that_are_none(devices: Any) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices must be 1 or more, a list .*, or auto"):
        Trainer(devices=devices)


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "deepspeed_stage_3", "dp", "ddp_spawn", ""])
def test_strategies_that_there_are_not(strategy: str) -> None:
    with pytest.raises(UserError, match=r"trainer\.strategy must be one of auto, ddp, .*") as refused:
        Trainer(strategy=strategy)
    divides = strategy in ("fsdp_cpu_offload", "deepspeed_stage_3")
    assert ("divides what is trained" in str(refused.value)) == divides


@pytest.mark.parametrize(
    ("gpus", "devices", "found"),
    [(0, "auto", 1), (0, 1, 1), (0, 3, 3), (4, "auto", 4), (4, 2, 2), (4, [3], 1), (4, [0, 2], 2)],
)
def test_how_many_processes_devices_mean(gpus: int, devices: Any, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks.count(Trainer(devices=devices)) == found


@pytest.mark.parametrize(
    ("gpus", "devices", "reason"),
    [(0, [0], "there are none"), (2, 3, "there are 2 GPUs here"), (2, [1, 2], "the GPUs here are 0 to 1")],
)
def test_devices_that_are_not_there(gpus: int, devices: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=reason):
        ranks.count(Trainer(devices=devices))


@pytest.mark.parametrize(
    ("gpus", "devices", "found"), [(0, 2, 1), (0, "auto", 1), (0, [1, 2], 1), (1, [1, 2], 1), (3, [2, 1], [2])]
)
def test_a_run_of_several_devices_is_measured_on_one(
    gpus: int, devices: Any, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for strategy in ("ddp", "fsdp"):
        options = ranks.lightning_options(Trainer(devices=devices, strategy=strategy), find_unused=False)
        assert options == {"devices": found, "strategy": "auto"}


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trainer.devices=3"], "data.batch_size is 32: it must be a multiple of the 3 devices"),
        (["trainer.devices=2", "trainer.micro_batch_size=32"], "must divide the 16 samples per device and step"),
        (["trainer.devices=8", "data.n_val=5"], "the val part of fold 0 has 5 samples, fewer than the 8 processes"),
        (["trainer.devices=two"], "trainer.devices must be 1 or more"),
        (["trainer.devices=2", "trainer.strategy=fsdp", "peft=full"], "[full] freezes none; take ddp"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    overrides: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coeft("train", *QUICK, *overrides, f"run_dir={tmp_path / 'run'}") == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_torchrun_starts_one_training_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert coeft("train", *QUICK, "seeds=[0,1]", f"run_dir={tmp_path / 'suite'}") == 2
    assert "a suite does not run under torchrun" in capsys.readouterr().err
    assert coeft("train", *QUICK, f"run_dir={tmp_path / 'run'}") == 2
    assert "torchrun started 2 processes here, but trainer.devices=1 is 1" in capsys.readouterr().err
    sweep = ["sweep=lr", "sweep.n_trials=1", *TINY, *DIGITS, f"run_dir={tmp_path / 'sweep'}"]
    assert coeft("sweep", *sweep) == 2
    assert "a sweep does not run under torchrun" in capsys.readouterr().err
    assert not ranks.speaks() and list(tmp_path.iterdir()) == []


def run(follow: ranks.Follow, body: Callable[[], None], folder: Path, world: int = 2) -> None:
    with pytest.MonkeyPatch.context() as patch:
        following.fork(patch)
        with ranks.several(SimpleNamespace(trainer=Trainer(devices=world)), folder, follow):
            body()


def wait() -> None:
    time.sleep(600)


def add() -> None:
    dist.all_reduce(torch.ones(1))


def test_processes_share_a_sum_and_leave_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sums: list[float] = []

    def body() -> None:
        value = torch.ones(1)
        dist.all_reduce(value)
        sums.append(float(value))
        assert ranks.place().world == 3 and ranks.is_first()

    run(following.adds, body, tmp_path, world=3)
    assert sums == [111.0] and ranks.place().world == 1 and not dist.is_initialized()
    assert "unheard" not in "".join(capfd.readouterr()) and list(tmp_path.iterdir()) == []
    assert not [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize(
    ("follow", "body", "kind", "text"),
    [
        (following.is_mistaken, wait, UserError, "^row 7 is empty$"),
        (following.fails, add, RuntimeError, r"(?s)process 2 of 2 failed:.*LookupError: no such shelf"),
        (following.fails, wait, RuntimeError, r"(?s)process 2 of 2 failed:.*LookupError: no such shelf"),
        (following.dies, add, Interrupted, r"process 2 of 2 was killed \(SIGKILL\)"),
        (following.dies, wait, Interrupted, r"process 2 of 2 was killed \(SIGKILL\)"),
        (following.leaves, wait, RuntimeError, "ended with exit code 3; it said last: out of cheese"),
    ],
)
def test_what_becomes_of_another_process_is_told(
    follow: ranks.Follow, body: Callable[[], None], kind: type, text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ranks, "SETTLE", 1.0)
    with pytest.raises(kind, match=text):
        run(follow, body, tmp_path)
    assert not dist.is_initialized() and ranks.place() == ranks.Place()


def _is_ours(child: psutil.Process) -> bool:
    """Not a servant of multiprocessing's, which lives as long as the test's own process."""
    line = " ".join(child.cmdline())
    return "resource_tracker" not in line and "forkserver" not in line


def test_the_first_process_ends_the_others_with_its_own_mistake(tmp_path: Path) -> None:
    before, found = psutil.Process().children(), list[psutil.Process]()

    def body() -> None:
        found.extend(child for child in psutil.Process().children() if child not in before and _is_ours(child))
        raise UserError("row 3 is empty")

    with pytest.raises(UserError, match="row 3 is empty"):
        run(following.stays, body, tmp_path)
    assert found and not multiprocessing.active_children()
    assert not [child for child in found if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
