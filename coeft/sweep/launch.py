"""Where jobs run: in this process, or in several beside it. Knows neither torch nor what a job is."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a job."""

    state: str
    """complete, pruned or failed."""
    values: list[float] = field(default_factory=list)
    """One for each objective, the mean over the runs."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the table and results.json say of the trial."""
    error: str | None = None
    fault: bool = False
    """The error is not the user's."""


Run = Callable[[Any], Done]
"""What does a job; a function of a module, so that another process can import it."""


class Launcher(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool:
        """Whether another job can begin now."""

    def submit(self, job: Any) -> None:
        """Begin a job."""

    def wait(self) -> tuple[Any, Done]:
        """The next job that is done; at least one must have been submitted."""

    def busy(self) -> int:
        """Number of jobs that were submitted and not returned by wait."""

    def close(self) -> None:
        """Stop what runs; its trials can be continued."""


class Inline:
    """One job at a time, in this process."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.jobs: list[Any] = []

    def has_room(self) -> bool:
        return not self.jobs

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def wait(self) -> tuple[Any, Done]:
        done = self.run(self.jobs[0])
        return self.jobs.pop(0), done

    def busy(self) -> int:
        return len(self.jobs)

    def close(self) -> None:
        self.jobs.clear()


class Processes:
    """Several jobs at a time, each in a process that lives on for the next job."""

    def __init__(self, count: int, run: Run) -> None:
        self.count, self.run = count, run
        self.idle: list[_Worker] = []
        self.running: list[tuple[_Worker, Any]] = []

    def has_room(self) -> bool:
        return len(self.running) < self.count

    def submit(self, job: Any) -> None:
        worker = self.idle.pop() if self.idle else _Worker(self.run)
        worker.pipe.send(job)
        self.running.append((worker, job))

    def wait(self) -> tuple[Any, Done]:
        ready = wait([worker.pipe for worker, _ in self.running])
        worker, job = next(entry for entry in self.running if entry[0].pipe in ready)
        self.running.remove((worker, job))
        try:
            done = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            return job, Done(state="failed", error=f"its process {how}", fault=True)
        self.idle.append(worker)
        return job, done

    def busy(self) -> int:
        return len(self.running)

    def close(self) -> None:
        workers = [*self.idle, *(worker for worker, _ in self.running)]
        self.idle, self.running = [], []
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(30)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


class _Worker:
    def __init__(self, run: Run) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, run), daemon=False)
        self.process.start()
        theirs.close()


def _serve(pipe: Connection, run: Run) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which ends this process in order
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)  # the parent was killed; whoever resumes the sweep continues the trial

    threading.Thread(target=follow, daemon=True).start()
    try:
        while True:
            pipe.send(run(pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        pass
