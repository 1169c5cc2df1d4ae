"""Jobs on a Ray cluster: one that is there, or one that is started on this machine. The only file that imports Ray."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeft import __version__
from coeft.errors import UserError
from coeft.run import write_text
from coeft.sweep.launch import Done, Run

log = logging.getLogger("coeft")

ATTEMPTS = 4  # of one job; more losses than that have a reason that another attempt does not mend
MARK = ".ray"  # a file with a secret, by which a node knows that it sees the sweep's own folder
_SIGHT_S = 15.0  # until a new file shows on a network file system
_HINT_S = 30.0  # of waiting, until the user is told why nothing runs
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # a trial that asks for no GPU must not see one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a node is sent: a job and what it needs to be done there."""

    run: Run
    job: Any
    folder: Path
    mark: str
    cwd: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """Why a node cannot do the jobs of this sweep at all."""

    reason: str


class RayLauncher:
    """Jobs as tasks of Ray, so many at a time. A job whose node or process is lost begins again, on any node.

    What the jobs write must be on a file system that all nodes share. Ray itself repeats nothing, so that every loss
    is counted here; that a lost process which still lives is waited for is the job's own duty.
    """

    def __init__(
        self, count: int, run: Run, folder: Path, *, address: str | None, gpus: float | None, cpus: Callable[[Any], int]
    ) -> None:
        """Connect, or start a cluster of `count` CPUs here.

        Args:
            folder: of the sweep, which every node must see under the same path.
            address: auto, HOST:PORT, or None for a cluster of this machine's own.
            gpus: of each job; None is one if the cluster has any.
            cpus: how many CPUs a job needs. On a cluster of our own `count` decides alone.
        Raises:
            UserError: there is no such cluster, or Ray is not installed.
        """
        self.count, self.run, self.folder, self.cpus = count, run, folder.absolute(), cpus
        self.running: dict[Any, tuple[Any, int]] = {}  # reference of Ray -> job, how many attempts before
        self.mark = secrets.token_hex(16)
        self.own = address is None
        self.undo = contextlib.ExitStack()
        try:
            self.ray = self._connect(address)
            write_text(self.folder / MARK, self.mark)
            self.undo.callback((self.folder / MARK).unlink, missing_ok=True)
            self.gpus = float(self.ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else float(gpus)
        except BaseException:
            self.undo.close()
            raise

    def _connect(self, address: str | None) -> Any:
        for key, value in _QUIET.items():
            os.environ.setdefault(key, value)
        if address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
            # Ray listens on every network of the machine and runs what it is sent; it reads this when imported
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "sweep.launcher=ray needs Ray: pip install 'coeft[ray]', or set sweep.launcher=local"
            ) from error
        # Ray writes about lost processes to standard output, which is for the path of the run directory
        self.undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        if ray.is_initialized():
            if address != "auto":
                raise UserError("sweep.address: this process is connected to Ray already; set sweep.address=auto")
            return ray
        if address not in (None, "auto"):
            _reach(address)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options |= {"num_cpus": self.count, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self.undo.callback(ray.shutdown)
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises Exception itself where a part of it does not start in time
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            if address is None:
                raise UserError(
                    f"sweep.launcher=ray: Ray does not start here: {reason}. Try again, or set sweep.launcher=local"
                ) from error
            raise UserError(f"sweep.address: no Ray cluster at {address}: {reason}") from error
        finally:
            for number, handler in before.items():  # Ray's own would exit without a word
                signal.signal(number, handler)
        return ray

    def has_room(self) -> bool:
        return len(self.running) < self.count

    def submit(self, job: Any) -> None:
        """Begin a job.

        Raises:
            UserError: no node has the CPUs and GPUs for it.
        """
        if not self._fits(job):
            raise UserError(
                f"no node of the Ray cluster has {self._needs(job)}, which each trial needs: "
                "set trainer.threads=N (its CPUs) and sweep.gpus=N"
            )
        self._send(job, 0)

    def wait(self) -> tuple[Any, Done]:
        """The next job that is done, or that was lost too often.

        Raises:
            UserError: a node does not see the sweep's folder, or has another version of coeft.
        """
        begun, told = time.monotonic(), False
        while True:
            ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_HINT_S)
            if ready:
                job, attempts = self.running.pop(ready[0])
                done = self._result(ready[0], job, attempts + 1)
                if done is not None:
                    return job, done
            elif not told and time.monotonic() - begun >= _HINT_S:
                missing = [job for job, _ in self.running.values() if not self._fits(job)]
                if missing:
                    log.warning("waiting for a node with %s", self._needs(missing[0]))
                    told = True

    def _result(self, reference: Any, job: Any, attempts: int) -> Done | None:
        """What became of a job; None if it was begun again."""
        errors = self.ray.exceptions
        try:
            done: Done | Unfit = self.ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ImportError):
                raise UserError(
                    f"a node of the Ray cluster cannot import coeft ({cause}): install coeft {__version__} on each"
                ) from error
            return Done(state="failed", error=f"{type(cause).__name__}: {cause}", fault=True)
        except errors.RayError as error:  # the node, the process or its memory
            what = str(error).strip().partition(". ")[0].splitlines()[0] if str(error).strip() else type(error).__name__
            if attempts >= ATTEMPTS:
                return Done(state="failed", error=f"its node or process was lost {attempts} times: {what}", fault=True)
            log.warning("a trial lost its node or process; it goes on from its last checkpoint (%s)", what)
            self._send(job, attempts)
            return None
        if isinstance(done, Unfit):
            raise UserError(done.reason)
        return done

    def _send(self, job: Any, attempts: int) -> None:
        order = Order(run=self.run, job=job, folder=self.folder, mark=self.mark, cwd=os.getcwd(), version=__version__)
        task = self.ray.remote(_work).options(
            num_cpus=self._cpus(job),
            num_gpus=self.gpus,
            max_retries=0,
            scheduling_strategy="SPREAD",
            name="coeft trial",
        )
        self.running[task.remote(order)] = job, attempts

    def _cpus(self, job: Any) -> int:
        return 1 if self.own else self.cpus(job)

    def _needs(self, job: Any) -> str:
        cpus = f"{self._cpus(job)} CPUs"
        return f"{cpus} and {self.gpus:g} GPUs" if self.gpus else cpus

    def _fits(self, job: Any) -> bool:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return any(node.get("CPU", 0) >= self._cpus(job) and node.get("GPU", 0) >= self.gpus for node in nodes)

    def busy(self) -> int:
        return len(self.running)

    def close(self) -> None:
        for reference in self.running:
            with contextlib.suppress(Exception):  # the cluster may be what failed
                self.ray.cancel(reference, force=True)
        self.running.clear()
        self.undo.close()


def _reach(address: str) -> None:
    """A connection to the address must open: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"sweep.address: nothing answers at {address} ({error.strerror or error}); it is the address that "
            "`ray start --head` prints, auto for the cluster of this machine, null to start one"
        ) from error


def _work(order: Order) -> Done | Unfit:
    """On a node: check that it is fit, then do the job."""
    where = socket.gethostname()
    if order.version != __version__:
        return Unfit(reason=f"node {where} has coeft {__version__}, but the sweep is of {order.version}: install that")
    if not _sees(order.folder, order.mark):
        return Unfit(
            reason=f"node {where} does not see {order.folder}: choose a run_dir on a file system that all nodes share, "
            "under the same path"
        )
    if os.path.isdir(order.cwd):  # paths in a config may be relative to where the command was typed
        os.chdir(order.cwd)
    return order.run(order.job)


def _sees(folder: Path, mark: str) -> bool:
    until = time.monotonic() + _SIGHT_S
    while True:
        with contextlib.suppress(OSError):
            if (folder / MARK).read_text(encoding="utf-8") == mark:
                return True
        if not folder.is_dir() or time.monotonic() > until:
            return False
        time.sleep(0.5)
