"""Jobs for worker processes, which import them by name."""

import os
import signal
import time
from pathlib import Path

from coeft.sweep.launch import Done


def dies_if_odd(job: int) -> Done:
    """Stands for run_job; a job is a number here."""
    if job % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return Done(state="complete", values=[float(job)])


def walks(job: tuple[Path, int, int]) -> Done:
    """Stands for a trial: a folder, how many steps it takes, how many times its process is killed at a step.

    Each step is a line of the file `steps`, so that a job which begins again goes on after its last one.
    """
    folder, steps, deaths = job
    folder.mkdir(exist_ok=True)
    diary = folder / "steps"
    done = len(diary.read_text().splitlines()) if diary.exists() else 0
    for step in range(done, steps):
        died = len(list(folder.glob("died_*")))
        if died < deaths and step >= min(died + 1, steps - 1):
            (folder / f"died_{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with diary.open("a") as file:
            file.write(f"{step}\n")
    return Done(state="complete", values=[float(done)])


def sleeps(job: Path) -> Done:
    """Writes its process id and does not end."""
    part = job.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.replace(job)
    time.sleep(3600)
    return Done(state="complete")
