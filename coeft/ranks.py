"""Several processes of one run, each with the whole model and a share of every batch.

The command's own process is the first. It alone writes and speaks; it starts the others when everything is checked and
the run directory is there, and watches them: one that dies ends the run at once. Processes that torchrun started on one
or several machines join each other instead, and torchrun watches them.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy

from coeft.config import Trainer
from coeft.errors import UserError
from coeft.interrupt import Interrupted, continued

T = TypeVar("T")
Follow = Callable[[Any, Path, Callable[[], None]], None]
"""What a further process does: (config, run directory, how to join the others once it is ready)."""

PATIENCE = timedelta(minutes=30)  # of a process for the others; one that died is noticed at once
SETTLE = 5.0  # seconds that the first process waits to learn why its connection broke
GRACE = 60.0  # seconds that it has to leave a call that does not return, such as one of NCCL
START = "spawn"  # a fork would inherit threads' locks and CUDA's state
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    machines: int = 1
    watched: bool = False
    """Another process of coeft started this one, and ends it."""


_place = Place()


def place() -> Place:
    """This process's place; the only one outside `several` and `launched`."""
    return _place


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _place.rank == 0


def count(trainer: Trainer) -> int:
    """How many processes of this machine trainer.devices means.

    Raises:
        UserError: there are not so many devices.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = trainer.devices
    if devices == "auto":
        return max(1, gpus)
    if isinstance(devices, list):
        if not gpus:
            raise UserError(f"trainer.devices={devices} names GPUs, and there are none; give a number of processes")
        if max(devices) >= gpus:
            raise UserError(f"trainer.devices={devices}: the GPUs here are 0 to {gpus - 1}")
        return len(devices)
    if devices > 1 and gpus and devices > gpus:
        raise UserError(f"trainer.devices is {devices}, but there are {gpus} GPUs here; lower it, or set it to auto")
    if devices > 1 and not gpus and torch.backends.mps.is_available():
        raise UserError(f"trainer.devices is {devices}, but there is one GPU here; set it to 1")
    return int(devices)


def processes(trainer: Trainer) -> int:
    """How many processes a run has over all machines, before or after they joined."""
    if _place.world > 1:
        return _place.world
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else count(trainer)


def under_torchrun() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return not _place.watched and all(os.environ.get(name) for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process may print, also before it joins the others and after it left them."""
    return is_first() and not (under_torchrun() and os.environ["RANK"] != "0")


def alone(what: str) -> None:
    """Refuse to be started several times over.

    Raises:
        UserError: torchrun started this process.
    """
    if under_torchrun():
        raise UserError(
            f"{what} does not run under torchrun, which is for one training over several machines; start it by itself, "
            "trainer.devices=N takes several devices of this machine"
        )


def lightning_options(trainer: Trainer, *, find_unused: bool) -> dict[str, Any]:
    """The arguments of a Lightning Trainer that say where it runs: in all processes that have joined, else in this one.

    Args:
        find_unused: some trained parameters may take no part in a step.
    """
    if _place.world == 1:
        first = trainer.devices[0] if isinstance(trainer.devices, list) else 0
        there = first < torch.cuda.device_count()  # a run may be evaluated on another machine
        return {"devices": [first] if first and there else 1, "strategy": "auto"}
    find_unused = find_unused or trainer.strategy == "ddp_find_unused_parameters_true"
    strategy = _Joined(cluster_environment=_Here(), find_unused_parameters=find_unused)
    devices = trainer.devices if isinstance(trainer.devices, list) else _place.world // _place.machines
    options = {"devices": devices, "num_nodes": _place.machines, "strategy": strategy}
    # weights that are gathered first under inference mode could not be used in training after it
    return options | {"inference_mode": False} if divided(trainer) else options


def divided(trainer: Trainer) -> bool:
    """Whether the processes that have joined divide the frozen weights: then all go through every forward together."""
    return _place.world > 1 and trainer.strategy == "fsdp"


class _Joined(DDPStrategy):
    """Lightning's ddp in processes that exist already."""

    def _configure_launcher(self) -> None:
        """None: Lightning's own would start the command again, and set the number of threads."""
        self._launcher = None


class _Here(ClusterEnvironment):
    """Tells Lightning this process's place."""

    creates_processes_externally = True
    main_address = "127.0.0.1"  # never asked for: the process group is there already
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return _place.world

    def set_world_size(self, size: int) -> None:
        assert size == _place.world

    def global_rank(self) -> int:
        return _place.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == _place.rank

    def local_rank(self) -> int:
        return _place.local_rank

    def node_rank(self) -> int:
        return _place.rank // (_place.world // _place.machines)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them."""
    if _place.world == 1:
        return make()
    found = [make() if is_first() else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


@contextmanager
def launched(trainer: Trainer) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them, and restore the number of threads, at the end.

    Raises:
        UserError: it started another number of processes than there are devices.
    """
    threads = torch.get_num_threads()
    try:
        if not under_torchrun() or _place.world > 1:
            yield
            return
        world, here = int(os.environ["WORLD_SIZE"]), count(trainer)
        started = int(os.environ.get("LOCAL_WORLD_SIZE", here))
        if started != here or world % here:
            raise UserError(
                f"torchrun started {started} processes here, but trainer.devices={trainer.devices} is {here}"
            )
        own = Place(
            rank=int(os.environ["RANK"]),
            world=world,
            local_rank=int(os.environ["LOCAL_RANK"]),
            machines=world // here,
        )
        if own.rank:
            _be_silent()
        with _member(own, _device(trainer, own.local_rank), init_method="env://"):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def several(config: Any, run_dir: Path, follow: Follow) -> Iterator[None]:
    """Run the body in as many processes as config.trainer.devices says, this one being the first.

    Args:
        follow: what the others do instead; a function of a module. It calls its third argument when it is about to do
            what the body does.
    Raises:
        Interrupted: another process was killed.
        UserError: another process met a mistake of the user's.
        RuntimeError: another process failed.
    """
    if _place.world > 1 or count(config.trainer) == 1:
        yield
        return
    team = _Team(count(config.trainer), run_dir)
    try:
        with team.started(config, follow):
            yield
    except BaseException as error:
        reason = team.reason(error)
        if reason is error:
            raise
        raise reason from error
    finally:
        team.end()


@dataclass(kw_only=True)
class _Other:
    """One of the processes that the first started."""

    rank: int
    process: Any
    pipe: multiprocessing.connection.Connection
    output: Path
    """What it wrote to standard output and error."""
    ready: bool = False
    failure: tuple[str, str] | None = None
    """"user" or "fault", and the message or traceback."""

    def listen(self) -> None:
        """Take what it has sent."""
        try:
            while self.pipe.poll():
                kind, text = self.pipe.recv()
                if kind == "ready":
                    self.ready = True
                else:
                    self.failure = self.failure or (kind, text)
        except (EOFError, OSError):
            pass

    @property
    def failed(self) -> bool:
        return self.failure is not None or self.process.exitcode not in (None, 0)


class _Team:
    """The other processes, as the first sees them."""

    def __init__(self, world: int, run_dir: Path) -> None:
        self.world, self.run_dir = world, run_dir
        self.others: list[_Other] = []
        self.folder = Path(tempfile.mkdtemp(prefix="coeft_"))
        self.leaving = threading.Event()
        self.nudged = False
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.turn = threading.Lock()  # of this process to leave, or of the watch to nudge it

    @contextmanager
    def started(self, config: Any, follow: Follow) -> Iterator[None]:
        """All processes, joined, until the body is done and they are too."""
        door = socket.socket()
        door.bind(("127.0.0.1", 0))  # nothing outside this machine can knock
        door.listen(self.world)
        port = door.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach(), timeout=PATIENCE
        )
        context: Any = multiprocessing.get_context(START)
        # They inherit that these signals are ignored: the first process decides what follows from them.
        with _ignored(signal.SIGINT):
            for rank in range(1, self.world):
                mine, theirs = context.Pipe()
                output = self.folder / f"{rank}.txt"
                own = Place(rank=rank, world=self.world, local_rank=rank, watched=True)
                process = context.Process(
                    target=_other,
                    args=(own, port, config, self.run_dir, follow, torch.get_num_threads(), theirs, output),
                )
                process.start()
                theirs.close()
                self.others.append(_Other(rank=rank, process=process, pipe=mine, output=output))
        while not all(other.ready for other in self.others):
            self.wait(0.2)
            if any(other.failed for other in self.others):
                raise RuntimeError("a process did not get ready")
        with _member(Place(world=self.world), _device(config.trainer, 0), store=store):
            self.watcher.start()
            yield
            self.leave()
            for other in self.others:
                other.pipe.send("done")
        for other in self.others:
            other.process.join(10)

    def wait(self, seconds: float) -> None:
        """Until a process says something or ends, at most so long."""
        waiting: list[Any] = [other.process.sentinel for other in self.others]
        multiprocessing.connection.wait([*waiting, *(other.pipe for other in self.others)], seconds)
        for other in self.others:
            other.listen()

    def watch(self) -> None:
        """In a thread: end what the first process does if another one died and nothing else ends it."""
        while not any(other.process.exitcode not in (None, 0) for other in self.others):
            multiprocessing.connection.wait([other.process.sentinel for other in self.others], 1.0)
            if self.leaving.wait(0.05):
                return
        if self.leaving.wait(SETTLE):  # its connection broke
            return
        with self.turn:
            if self.leaving.is_set():
                return
            self.nudged = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # ends a wait of the system's too
        if self.leaving.wait(GRACE):
            return
        for other in self.others:
            other.listen()
            other.process.kill()
        reason = self.explained(RuntimeError("no answer"))
        print(f"coeft: {reason}; {continued(self.run_dir)}", file=sys.stderr, flush=True)
        os._exit(130)

    def leave(self) -> None:
        """From here on the watch does nothing; an interrupt of its that is under way ends here."""
        try:
            with self.turn:
                self.leaving.set()
            time.sleep(0)
        except KeyboardInterrupt:
            if not self.nudged:
                raise
            self.leaving.set()

    def reason(self, error: BaseException) -> BaseException:
        """Why the body ended: another process's failure if that was the cause, else the error itself."""
        self.leave()
        if isinstance(error, UserError) or (isinstance(error, KeyboardInterrupt | SystemExit) and not self.nudged):
            return error
        end = time.monotonic() + SETTLE
        while not any(other.failed for other in self.others) and time.monotonic() < end:
            self.wait(0.2)
        settled = time.monotonic() + 1  # one that was killed takes the others with it
        while any(other.failed for other in self.others) and time.monotonic() < settled:
            self.wait(0.1)
            if all(other.process.exitcode is not None for other in self.others):
                break
        return self.explained(error)

    def explained(self, error: BaseException) -> BaseException:
        """The failure that came first: a killed process, a mistake of the user's, anything else."""
        for other in self.others:
            code = other.process.exitcode
            if code is not None and code < 0:
                return Interrupted(
                    f"process {other.rank + 1} of {self.world} was killed ({_signal_name(code)}){_hint(other)}"
                )
        failures = [(other, *other.failure) for other in self.others if other.failure is not None]
        for other, kind, text in sorted(failures, key=lambda failure: failure[1] != "user"):
            if kind == "user":
                return UserError(text)
            return RuntimeError(f"process {other.rank + 1} of {self.world} failed:\n{text}")
        for other in self.others:
            if other.process.exitcode:
                return RuntimeError(
                    f"process {other.rank + 1} of {self.world} ended with exit code {other.process.exitcode}"
                    f"{_hint(other)}"
                )
        return error

    def end(self) -> None:
        """Leave no process behind."""
        self.leaving.set()
        for other in self.others:
            if other.process.exitcode is None:
                other.process.kill()
        for other in self.others:
            other.process.join(5)
            other.pipe.close()
        if self.watcher.is_alive():
            self.watcher.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)


def _other(
    own: Place,
    port: int,
    config: Any,
    run_dir: Path,
    follow: Follow,
    threads: int,
    pipe: multiprocessing.connection.Connection,
    output: Path,
) -> None:
    """What a process other than the first runs from its beginning to its end."""
    global _place
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _place = Place(rank=own.rank, watched=True)
    torch.set_num_threads(threads)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, "a", buffering=1)
    _be_silent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)

    def join() -> None:
        pipe.send(("ready", ""))
        membership.__enter__()

    membership = _member(own, _device(config.trainer, own.local_rank), store=store)
    try:
        follow(config, run_dir, join)
        pipe.recv()  # the others may still be reading what this process sent last
        membership.__exit__(None, None, None)
    except UserError as error:
        pipe.send(("user", str(error)))
        code = 2
    except BaseException:
        pipe.send(("fault", traceback.format_exc()))
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the process group of a run that failed may not close


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _member(own: Place, device: torch.device, **how: Any) -> Iterator[None]:
    """The process group, and this process's place in it, for as long as the body runs.

    Args:
        how: how the processes find each other, as of init_process_group.
    """
    global _place
    before = _place
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if own.machines == 1 and sys.platform in (
        "linux",
        "darwin",
    ):  # not the name of this machine, which may lead outside
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group(backend, rank=own.rank, world_size=own.world, timeout=PATIENCE, **how)
    _place = own
    try:
        yield
    finally:
        _place = before
        if sys.exc_info()[0] is None or backend == "gloo":  # NCCL would wait for those that died
            dist.destroy_process_group()


def _device(trainer: Trainer, local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", trainer.devices[local_rank] if isinstance(trainer.devices, list) else local_rank)


def _be_silent() -> None:
    """Leave speaking to the first process."""
    log = logging.getLogger("coeft")
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.addHandler(logging.NullHandler())
    log.propagate = False


@contextmanager
def _ignored(number: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _hint(other: _Other) -> str:
    """What may be behind the end of a process."""
    if other.process.exitcode == -signal.SIGKILL:
        return "; if nobody did it, the machine was out of memory: lower trainer.micro_batch_size"
    lines = other.output.read_text(errors="replace").splitlines() if other.output.is_file() else []
    said = [line for line in lines if line.strip()][-3:]
    return f"; it said last: {' / '.join(said)}" if said else ""
