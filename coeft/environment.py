"""What decides a run's numbers besides its config: versions, processor, threads, the data. RUN/environment.json."""

import logging
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coeft.config import shorten_home
from coeft.data._data import Data
from coeft.run import versions

log = logging.getLogger("coeft")


def environment(data: Data, threads: int) -> dict[str, Any]:
    """What RUN/environment.json holds; neither user nor host name stands in it."""
    left_out = [shorten_home(text) for text in (*data.skipped, *data.empty)]
    return {
        **machine(),
        "threads": threads,
        "git_commit": _git_commit(),
        "command": shorten_home(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "data_fingerprint": data.fingerprint,
        "data": data.fingerprints,
        **({"left_out": left_out} if left_out else {}),
    }


def machine() -> dict[str, Any]:
    """Versions and devices of this process."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _git_commit() -> str | None:
    source = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    tracked = subprocess.run(
        ["git", "-C", str(source), "ls-files", "--error-unmatch", Path(__file__).name],
        capture_output=True, check=False,
    )  # fmt: skip
    return git.stdout.strip() if git.returncode == 0 and tracked.returncode == 0 else None


def _processor() -> str:
    """The processor's model; its architecture where the system does not tell the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Versions and devices of two environments that differ, each such as "torch: 2.13.0 then, 2.14.1 now"."""
    then, today = before.get("versions", {}), now["versions"]
    facts = [(name, then.get(name, "none"), today.get(name, "none")) for name in dict.fromkeys([*then, *today])]
    if "cpu" in before:
        facts.append(("cpu", before["cpu"], now["cpu"]))
        if not all(each["cpu"].startswith(each["device"]) for each in (before, now)):
            facts.append(("device", before["device"], now["device"]))
    return [f"{name}: {old} then, {new} now" for name, old, new in facts if old != new]


def changed_data(before: Mapping[str, Any], data: Data) -> str | None:
    """How data differs from what RUN/environment.json was written with, such as "other samples or labels: test"."""
    if before.get("data_fingerprint") in (None, data.fingerprint):
        return None
    then, now = before.get("data", {}), data.fingerprints
    parts = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return f"other samples or labels: {', '.join(parts)}" if parts else "other class names"


def warn_of_changes(run_dir: Path, before: Mapping[str, Any], what: str) -> list[str]:
    """Name the versions and devices that differ from those a run was made with; gives them.

    Args:
        before: the environment that the run was made in.
        what: what follows from it.
    """
    changes = differences(before, machine())
    if changes:
        log.warning("%s was made in another environment, so that %s: %s", run_dir, what, "; ".join(changes))
    return changes
