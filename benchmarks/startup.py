"""How long the command line takes to answer.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--repeats 5] [--out startup.json]

coeft --help, a config error (an unknown key), dry_run of the quickstart, and the quickstart up to the end of its first
training step; each in a process of its own, interleaved. Medians of wall-clock seconds and of CPU seconds (user and
system, the process and its children): on a machine with other work the second is what coeft takes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COEFT = [sys.executable, "-m", "coeft.cli"]
QUICK = ["recipe=quickstart", "trainer.progress=false"]
FIRST_STEP = """
import os, sys
from coeft.cli.main import main
from coeft.module import TuningModule
TuningModule.on_train_batch_end = lambda *args: os._exit(77)
main(sys.argv[1:])
"""
# what -> (command, exit code, goal in seconds)
CASES: dict[str, tuple[list[str], int, float | None]] = {
    "coeft --help": ([*COEFT, "--help"], 0, 0.5),
    "a config error": ([*COEFT, "train", *QUICK, "optim.lrr=1"], 2, 1.0),
    "dry_run of the quickstart": ([*COEFT, "train", *QUICK, "dry_run=true"], 0, None),
    "quickstart to the end of its first step": ([sys.executable, "-c", FIRST_STEP, "train", *QUICK], 77, 10.0),
}


def run(command: list[str], code: int, folder: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*command], capture_output=True, text=True, check=False, cwd=folder)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}: {done.returncode}, not {code}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("startup.json"))
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats + 1):
            for name, (command, code, _) in CASES.items():
                measured = run(command, code, Path(folder))
                if turn:  # the first one fills the caches of the system
                    times[name].append(measured)
    print("| what | wall s | CPU s | goal |\n|---|---|---|---|")
    rows = []
    for name, (_, _, goal) in CASES.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        rows.append({"what": name, "wall_s": wall, "cpu_s": cpu, "goal_s": goal})
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {'' if goal is None else f'≤ {goal:g}'} |")
    options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
