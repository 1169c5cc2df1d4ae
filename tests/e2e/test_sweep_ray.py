"""coeft sweep on Ray: the same numbers as in one process, nodes that are killed, Ctrl-C."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small import DIGITS, TINY, coeft, lasting, results

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

GRID = [*TINY, *DIGITS, "trainer.progress=false", "trainer.threads=1", "sweep.sampler=grid", "peft=coeff"]


def start(run: Path, *line: str) -> subprocess.Popen[str]:
    """coeft sweep in a process of its own, as from a terminal."""
    command = [sys.executable, "-m", "coeft.cli", "sweep", *line, f"run_dir={run}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def until(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def trials(run: Path) -> list[dict[str, str]]:
    """RUN/trials.csv without what depends on the clock."""
    with (run / "trials.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "wall_s"} for row in csv.DictReader(file)]


def under_way(run: Path) -> list[Path]:
    """Folders of trials that have a checkpoint and are not done."""
    found = (run / "trials").glob("*/checkpoints/last.ckpt")
    return [path.parents[1] for path in found if not (path.parents[1] / "results.json").exists()]


def assert_same(run: Path, whole: Path, count: int) -> None:
    """Every trial once, each with the numbers that one process gives."""
    assert trials(run) == trials(whole)
    assert [row["trial"] for row in trials(run)] == [str(number) for number in range(count)]
    assert {row["state"] for row in trials(run)} == {"complete"}
    for number in range(count):
        folder = f"trials/{number:04}"
        assert lasting(results(run / folder)) == lasting(results(whole / folder))
        with (run / folder / "metrics.csv").open(newline="") as file:
            epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row["val/loss"]]
        assert epochs == list(range(len(epochs)))
    timeless = ("best", "pareto", "wall_s")
    one, other = ({key: value for key, value in results(path).items() if key not in timeless} for path in (run, whole))
    assert one == other and results(run)["best"]["number"] == results(whole)["best"]["number"]


def test_a_node_killed_in_the_middle_loses_no_trial(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    grid = [*GRID, "data.n_train=120", "trainer.max_epochs=48", "sweep.space.optim.lr=[1e-3,3e-3,1e-2,3e-2]"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        run = tmp_path / "run"
        ray = ["sweep.launcher=ray", f"sweep.address={cluster.address}", "sweep.n_jobs=2"]
        process = start(run, *grid, *ray)
        until(process, lambda: len(under_way(run)) == 2)  # one on each node
        cluster.remove_node(second, allow_graceful=False)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out == f"{run}\n"
        assert err.count("goes on from its last checkpoint") == 1
    finally:
        cluster.shutdown()
    logs = [(run / "trials" / f"{number:04}" / "log.txt").read_text() for number in range(4)]
    assert sorted(text.count("data digits") for text in logs) == [1, 1, 1, 2]  # one trial began again
    assert [text.count(" epoch 0, ") for text in logs] == [1, 1, 1, 1]  # and went on where it was
    assert coeft("sweep", *grid, f"run_dir={tmp_path / 'whole'}") == 0
    assert_same(run, tmp_path / "whole", 4)


def test_a_cluster_of_its_own_is_interrupted_and_continued(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    line = [
        "recipe=quickstart", "sweep=grid", *TINY, "data.n_train=120", "data.n_test=60", "cv.folds=2",
        "trainer.max_epochs=3", "trainer.threads=1",
        "sweep.space.optim.lr=[3e-3,1e-2]", "sweep.space.optim.weight_decay=null",
    ]  # fmt: skip
    ray = ["sweep.launcher=ray", "sweep.n_jobs=2"]
    process = start(run, *line, *ray)
    until(process, lambda: bool(list(run.glob("trials/*/fold_*/checkpoints/last.ckpt"))))
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "coeft resume" in err, err
    assert not psutil.wait_procs(children, timeout=30)[1]  # nothing of the cluster lives on
    assert not (run / "results.json").exists()
    process = start(run, *line, *ray)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out == f"{run}\n"
    assert coeft("sweep", *line, f"run_dir={tmp_path / 'whole'}") == 0
    assert trials(run) == trials(tmp_path / "whole")
    for number in range(2):
        folder = f"trials/{number:04}"
        assert lasting(results(run / folder)) == lasting(results(tmp_path / "whole" / folder))
