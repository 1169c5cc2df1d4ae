"""How much memory a training step takes and how much there is, known before the kernel ends a run without a word."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from coeft import ranks, sharding
from coeft.assemble import Assembled, micro_batch_size
from coeft.config import TrainConfig
from coeft.data._folds import Fold
from coeft.data._module import FoldData, Samples
from coeft.data._part import Batch

log = logging.getLogger("coeft")

CGROUPS = Path("/sys/fs/cgroup")
MIB = 2**20


def warn_of_memory(cfg: TrainConfig, built: Assembled, fold: Fold) -> None:
    """Say so if the first step is estimated to take more memory than is free."""
    need, free = step_memory(cfg, built, fold), free_memory()
    if need > free:
        micro = cfg.trainer.micro_batch_size
        log.warning(
            "a training step is estimated to take %s MiB more than the program has now, and %s MiB are free: the "
            "system may end the run without a word; lower trainer.micro_batch_size (now %s, data.batch_size is %d)",
            f"{need / MIB:,.0f}", f"{free / MIB:,.0f}", "null" if micro is None else micro, cfg.data.batch_size,
        )  # fmt: skip


def step_memory(cfg: TrainConfig, built: Assembled, fold: Fold) -> int:
    """Estimated bytes that training takes on this machine above what the program has before its first step.

    Gradients and the optimizer's two moments of what is trained, and what one micro-batch's forward saves for the
    backward pass: that of two samples, the longest there are, times their number. What a layer holds for an instant
    is not counted, nor what validation, worker processes and the libraries take. On a CUDA device the weights count
    too, and each further process on the CPU has its own (trainer.strategy=fsdp divides them once they are read).
    """
    devices = ranks.count(cfg.trainer)
    micro = micro_batch_size(cfg, ranks.processes(cfg.trainer))
    _, per_sample = probe(built, longest(cfg, built, fold, min(2, micro)))
    weights, trained = (
        sum(p.numel() * p.element_size() for p in built.module.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    step = 3 * trained + per_sample * micro
    if torch.cuda.is_available():
        if cfg.trainer.strategy == "fsdp" and (processes := ranks.processes(cfg.trainer)) > 1:
            return sharding.resident(built.backbone, built.stack, processes) + step
        return weights + step
    return devices * step + (devices - 1) * weights


def longest(cfg: TrainConfig, built: Assembled, fold: Fold, count: int) -> Batch:
    """The training samples with the most tokens as a batch; the first ones where all are of one size."""
    capacity = built.module.task.capacity(built.backbone, cfg.data)
    samples: Dataset = FoldData(
        fold, batch_size=1, eval_batch_size=1, seed=cfg.seed, num_workers=0, capacity=capacity
    ).samples
    chosen = np.arange(min(count, len(samples)))  # type: ignore[arg-type]
    if isinstance(samples, Samples) and len(samples.part.stores) == 1:
        store = samples.part.stores[0]
        store = getattr(store, "tokens", store)  # of questions with choices
        if hasattr(store, "lengths"):
            lengths = store.lengths(samples.part.rows[:, 1])
            chosen = np.argsort(-lengths, kind="stable")[:count]
    return samples.__getitems__(chosen.tolist())  # type: ignore[attr-defined]


def probe(built: Assembled, batch: Batch) -> tuple[float, int]:
    """Loss of a batch in training mode, and bytes that one sample's forward saves for the backward pass.

    Leaves the model as it was: buffers, modes and the random generator.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in built.module.parameters()}
    with unchanged(built.module), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        built.module.train()
        loss = built.module.task.loss(built.module(batch), batch, training=True)
        total = sum(size for pointer, size in saved.items() if pointer not in held)
    return float(loss.detach()), total // len(batch["labels"])


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Modes, buffers and the CPU's random generator of a module are as they were afterwards."""
    modes = {each: each.training for each in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for each, training in modes.items():
            each.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def free_memory() -> int:
    """Bytes that may still be taken: of the machine, control groups, `ulimit -v`; of a CUDA device if there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    rooms = [psutil.virtual_memory().available, *cgroup_rooms(Path("/proc/self/cgroup"), CGROUPS)]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        rooms.append(max(0, limit - psutil.Process().memory_info().vms))
    return int(min(rooms))


def cgroup_rooms(membership: Path, mounted: Path) -> list[int]:
    """Bytes left in each control group that limits the memory of a process; files that could be dropped count as left.

    Args:
        membership: the process's groups, such as /proc/self/cgroup.
        mounted: where the groups are; those of version 1 in its folder memory.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mounted / "memory" if controllers else mounted
        names = ("limit_in_bytes", "usage_in_bytes", "total_") if controllers else ("max", "current", "")
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            room = _room(group, *names)
            if room is not None:
                rooms.append(room)
            if group == root:
                break
    return rooms


def _room(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes left in one group; None if it has no limit, or is not to be seen from inside a container."""
    try:
        most = int((group / f"memory.{limit}").read_text())
        used = int((group / f"memory.{usage}").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no limit
        return None
    return max(0, most - used + int(facts.get(f"{prefix}inactive_file", 0)))
