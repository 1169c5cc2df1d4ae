"""The loggers besides metrics.csv write what they are given into the run directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coeft.loggers.csv import Csv
from coeft.loggers.tensorboard import TensorBoard
from coeft.loggers.wandb import Wandb


def test_csv_and_disabled_wandb_add_nothing(tmp_path: Path) -> None:
    assert Csv().build(tmp_path, "run", {}) == [] == Wandb(mode="disabled").build(tmp_path, "run", {})


@pytest.mark.slow
def test_each_fold_is_a_run_of_its_own(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for fold in (0, 1):
        (board,) = TensorBoard().build(tmp_path, f"run/fold_{fold}", {"seed": 1})
        board.log_metrics({"val/loss": 0.5 + fold}, step=3)
        board.finalize("success")
        events = EventAccumulator(str(tmp_path / "tensorboard" / "run" / f"fold_{fold}")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(3, 0.5 + fold)]
    runs = [Wandb(mode="offline", tags=["a"]).build(tmp_path, f"run/fold_{fold}", {"seed": fold})[0] for fold in (0, 1)]
    try:
        runs[1].log_metrics({"val/loss": 0.5}, step=3)
        assert runs[0].experiment.id != runs[1].experiment.id
        assert [run.experiment.config["seed"] for run in runs] == [0, 1]
        assert [(run.experiment.name, run.experiment.group) for run in runs] == [
            ("run/fold_0", "run"),
            ("run/fold_1", "run"),
        ]
    finally:
        for run in runs:
            run.experiment.finish()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.slow
def test_wandb_without_a_login_is_the_users_to_mend(tmp_path: Path) -> None:
    build = "Wandb().build(pathlib.Path(sys.argv[1]), 'run', {})"
    code = f"import pathlib, sys; from coeft.loggers.wandb import Wandb; {build}"
    hidden = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    # a process of its own: wandb reads its environment once
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, env=hidden | home, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("coeft.errors.UserError: logger: no run at Weights & Biases: ")
    assert last.endswith("log in by `wandb login`, or set logger.mode=offline")
