"""coeft sweep on real digits: whole studies, interrupted ones, failing trials, grids, fronts, pruning, processes."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from small import DIGITS, TINY, coeft, lasting, results

from coeft.sweep.study import Address

BASE = [*TINY, *DIGITS, "data.n_train=120", "trainer.max_epochs=2", "trainer.progress=false"]
LR = ["sweep.space.optim.lr={low: 1e-3, high: 1e-1, log: true}", "sweep.sampler=random"]


def sweep(run: Path, *line: str) -> int:
    return coeft("sweep", *BASE, *line, f"run_dir={run}")


def trials(run: Path) -> list[dict[str, str]]:
    """RUN/trials.csv."""
    with (run / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def drawn(run: Path) -> list[dict[str, str]]:
    """What of RUN/trials.csv does not depend on the clock."""
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in trials(run)]


def study(run: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=Address(storage=None, file=run / "study.db", name=name).open())


def test_the_best_trial_is_a_recipe_that_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a sweep, é=1"
    assert sweep(run, *LR, "peft=[coeff,lora]", "sweep.n_trials=3", "cv.folds=2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(run)
    values = results(run)
    assert values["status"] == "completed" and values["trials"]["complete"] == 3
    folders = [run / "trials" / f"{number:04}" for number in range(3)]
    scores = [results(folder)["validation"] for folder in folders]
    best = scores.index(max(scores))
    assert values["best"]["number"] == best and values["value"] == max(scores)
    # selection is on validation; the held-out folds of the best trial alone are told, once
    assert values["heldout"] == results(folders[best])["value"]
    assert err.count("on data that chose nothing") == 1 and "accuracy on test" not in err
    for name in ("history", "space"):
        assert (run / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert coeft("train", f"recipe={run / 'best.yaml'}", f"run_dir={tmp_path / 'again'}") == 0
    assert lasting(results(tmp_path / "again")) == lasting(results(folders[best]))
    rate = values["best"]["params"]["optim.lr"]
    assert (
        coeft("train", *BASE, "peft=[coeff,lora]", "cv.folds=2", f"optim.lr={rate}", f"run_dir={tmp_path / 'b'}") == 0
    )
    assert lasting(results(tmp_path / "b")) == lasting(results(folders[best]))
    for folder in folders:  # what the score is: the picked epoch on the inner validation part, mean over folds
        per_fold = []
        for fold in range(2):
            epoch = json.loads((folder / f"fold_{fold}" / "fold.json").read_text())["row"]["best_epoch"]
            with (folder / "metrics.csv").open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if r["val/accuracy"] and int(r["fold"]) == fold]
            per_fold.append(next(float(r["val/accuracy"]) for r in rows if int(r["epoch"]) == epoch))
        assert results(folder)["validation"] == pytest.approx(statistics.fmean(per_fold), abs=1e-6)
    assert coeft("eval", run) == 2
    assert "is a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*LR, "peft=coeff", "sweep.sampler=tpe", "sweep.n_trials=5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sweep(whole, *line) == 0
    from coeft.module import TuningModule

    original, calls = TuningModule.training_step, []

    def stop(self: TuningModule, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TuningModule, "training_step", stop)
    stops = [12, 30]  # in the second trial, and some trials later
    assert sweep(parts, *line) == 130
    assert f"coeft resume {parts}" in capsys.readouterr().err
    assert not (parts / "results.json").exists()
    before = (parts / "trials" / "0000" / "results.json").stat().st_mtime_ns
    assert sweep(parts, *line) == 130  # the same command
    assert coeft("resume", parts) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(parts)
    monkeypatch.undo()
    assert (parts / "trials" / "0000" / "results.json").stat().st_mtime_ns == before
    assert drawn(parts) == drawn(whole)
    assert [row["trial"] for row in trials(parts)] == list("01234")
    for number in range(5):
        folder = f"trials/{number:04}"
        assert lasting(results(parts / folder)) == lasting(results(whole / folder))
    assert (parts / "best.yaml").read_text().splitlines()[3:] == (whole / "best.yaml").read_text().splitlines()[3:]

    assert sweep(parts, *line) == 2  # complete
    assert "sweep.n_trials=N goes on" in capsys.readouterr().err
    assert sweep(parts, *line, "seed=1") == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert sweep(parts, *line[:-1], "sweep.n_trials=6") == 0
    assert len(trials(parts)) == 6


def test_a_failing_trial_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["peft=full", "trainer.clip_norm=null", "sweep.sampler=grid"]
    assert sweep(tmp_path / "one", *line, "sweep.space.peft.full.lr=[1e30,1e-3]") == 0
    assert results(tmp_path / "one")["trials"] == {"complete": 1, "pruned": 0, "failed": 1, "running": 0}
    failed, complete = trials(tmp_path / "one")
    assert failed["state"] == "failed" and "lower optim.lr" in failed["error"]
    assert "lower optim.lr" in (tmp_path / "one" / "trials" / "0000" / "error.txt").read_text()
    assert complete["state"] == "complete" and results(tmp_path / "one")["best"]["number"] == 1
    capsys.readouterr()
    assert sweep(tmp_path / "all", *line, "sweep.space.peft.full.lr=[1e30,1e31]") == 2
    assert "all 2 trials failed" in capsys.readouterr().err
    assert not (tmp_path / "all" / "results.json").exists()


@pytest.mark.slow
def test_a_grid_is_covered_once_and_its_front_is_right(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [
        "sweep.space.peft=[none,[coeff],[lora]]",
        "sweep.space.peft.lora.rank=[1,4]", "sweep.space.optim.lr=[3e-3,3e-2]",
        "sweep.objectives=[validation,trainable_params]", "sweep.sampler=grid", "trainer.max_epochs=1",
    ]  # fmt: skip
    assert sweep(run, *line, "sweep.n_trials=5") == 0
    assert sweep(run, *line) == 0  # the rest of it
    points = [(row["peft"], row["peft.lora.rank"], float(row["optim.lr"])) for row in trials(run)]
    expected = [
        (peft, rank, lr)
        for peft, ranks in (("none", [""]), ('["coeff"]', [""]), ('["lora"]', ["1", "4"]))
        for rank in ranks
        for lr in (3e-3, 3e-2)
    ]
    assert sorted(points) == sorted(expected)
    measured = {}
    for number in range(8):
        own = results(run / "trials" / f"{number:04}")
        measured[number] = (own["validation"], own["trainable_params"])
    front = {
        number
        for number, (score, size) in measured.items()
        if not any(s >= score and p <= size and (s, p) != (score, size) for s, p in measured.values())
    }
    values = results(run)
    assert {trial["number"] for trial in values["pareto"]} == front
    assert values["best"]["values"]["validation"] == max(score for score, _ in measured.values())
    assert (run / "plots" / "pareto.png").is_file()
    assert yaml.safe_load((run / "best.yaml").read_text())["seed"] == 0


def test_equal_settings_are_not_run_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ["sweep.space.peft.coeff.dropout=[0.0,0.3]", "sweep.sampler=random", "sweep.n_trials=4", "peft=coeff"]
    assert sweep(run, *line, "trainer.max_epochs=1") == 0
    rows = trials(run)
    assert len(rows) == 4 and len({row["peft.coeff.dropout"] for row in rows}) <= 2
    assert len(list((run / "trials").iterdir())) == 4 - sum(bool(row["same_as"]) for row in rows) <= 2
    for row in rows:
        if row["same_as"]:
            twin = rows[int(row["same_as"])]
            assert (twin["peft.coeff.dropout"], twin["validation"]) == (row["peft.coeff.dropout"], row["validation"])


@pytest.mark.slow
def test_the_pruner_hears_of_every_epoch_and_fold(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert sweep(run, *LR, "peft=coeff", "sweep.n_trials=2", "sweep.pruner=median", "cv.folds=2") == 0
    for trial in study(run, "train-sweep").trials:
        assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
        own = results(run / "trials" / f"{trial.number:04}")
        assert trial.intermediate_values[4] == pytest.approx(own["validation"], abs=1e-6)


def test_a_trial_that_is_worse_is_pruned_in_a_shared_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    before = optuna.create_study(storage=url, study_name="train-sweep", direction="maximize")
    perfect = optuna.trial.create_trial(
        value=2.0,
        intermediate_values={step: 2.0 for step in range(1, 5)},
        params={"optim.lr": 0.01},
        distributions={"optim.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)},
        user_attrs={"owner": "another machine", "threads": 1, "heldout": 0.5},
    )
    before.add_trials([perfect] * 5)
    run = tmp_path / "run"
    line = [*LR, "peft=coeff", "sweep.pruner=median", f"sweep.storage={url}", "trainer.max_epochs=4"]
    assert sweep(run, *line, "sweep.n_trials=6") == 0
    *_, last = trials(run)
    assert (last["trial"], last["state"]) == ("5", "pruned")
    assert not (run / "trials" / "0005" / "results.json").exists()
    reported = optuna.load_study(storage=url, study_name="train-sweep").trials[5].intermediate_values
    assert sorted(reported) == [1]  # ended after the first epoch
    assert results(run)["best"] | {"params": 0} == results(run)["best"] | {"params": 0, "run_dir": None, "number": 0}
    assert sweep(tmp_path / "other", "peft=coeff", "sweep.space.optim.lr=[1,2]", f"sweep.storage={url}") == 2


@pytest.mark.slow
def test_several_seeds_a_trial(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the loss: on few images two seeds may have the same accuracy
    line = ["peft=coeff", "task.metric=loss", "sweep.space.optim.lr=[3e-3]", "sweep.sampler=grid", "sweep.seeds=[0,1]"]
    assert sweep(run, *line, "trainer.max_epochs=1") == 0
    own = [results(run / "trials" / "0000" / f"seed_{seed}") for seed in (0, 1)]
    assert own[0]["validation"] != own[1]["validation"] or own[0]["value"] != own[1]["value"]
    assert results(run)["value"] == pytest.approx(statistics.fmean(entry["validation"] for entry in own))
    assert coeft("train", f"recipe={run / 'best.yaml'}", f"run_dir={tmp_path / 'again'}") == 0
    again = [results(tmp_path / "again" / f"seed_{seed}") for seed in (0, 1)]
    assert [lasting(entry) for entry in again] == [lasting(entry) for entry in own]


@pytest.mark.slow
def test_latency_is_an_objective(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ["sweep.space.peft=[none,[coeff]]", "sweep.sampler=grid", "sweep.objectives=[latency_ms]"]
    assert sweep(run, *line, "trainer.max_epochs=1", "cv.folds=2") == 0
    values = [float(row["latency_ms"]) for row in trials(run)]
    assert all(value > 0 for value in values) and results(run)["value"] == min(values)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "run", *LR, "peft=coeff", "dry_run=true") == 0
    assert not (tmp_path / "run").exists()


def test_one_process_for_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(run, *LR, "peft=coeff", "sweep.n_trials=1") == 2
    assert "another process" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_lose_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [*LR, "peft=coeff", "sweep.n_trials=5", "sweep.n_jobs=2", "trainer.max_epochs=3"]
    command = [sys.executable, "-m", "coeft.cli", "sweep", *BASE, *line, f"run_dir={run}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (run / "trials.csv").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its workers end by themselves
    assert not (run / "results.json").exists()
    assert coeft("resume", run) == 0
    rows = trials(run)
    assert [row["trial"] for row in rows] == list("01234") and {row["state"] for row in rows} == {"complete"}
    assert len(list((run / "trials").iterdir())) == 5
    best = results(run)["best"]["number"]
    assert coeft("train", f"recipe={run / 'best.yaml'}", f"run_dir={tmp_path / 'again'}") == 0
    assert lasting(results(tmp_path / "again")) == lasting(results(run / "trials" / f"{best:04}"))
