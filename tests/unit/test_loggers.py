"""The loggers besides metrics.csv write what they are given into the run directory."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import QUICK, command, trained

from coeft.loggers._findings import Table, place_of
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
        (trial,) = Wandb(mode="offline").build(tmp_path / "sweep", "0003/fold_0", {}, group="quickstart/sweep-lr")
        runs.append(trial)
        assert trial.experiment.group == "quickstart/sweep-lr"
        assert trial.experiment.name == "quickstart/sweep-lr/0003/fold_0"
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


def test_a_table_leaves_lists_out_and_keeps_every_column() -> None:
    table = Table.of([{"fold": 0, "value": 0.5, "per_class": [1, 2]}, {"fold": 1, "value": None, "note": "a|b"}])
    assert table.columns == ["fold", "value", "note"] and table.rows == [[0, 0.5, None], [1, None, "a|b"]]
    assert table.markdown().splitlines()[2:] == ["| 0 | 0.5 |  |", "| 1 |  | a\\|b |"]
    assert table.csv() == "fold,value,note\n0,0.5,\n1,,a|b\n"


def test_runs_are_grouped_by_their_sweep_or_suite(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep-lr"
    (sweep / "trials" / "0003" / ".members").mkdir(parents=True)
    (sweep / "sweep.yaml").touch()
    (sweep / "base.yaml").write_text("recipe: quickstart\n")
    (tmp_path / "suite" / ".members").mkdir(parents=True)
    assert place_of(sweep) == ("quickstart/sweep-lr", "summary")
    assert place_of(sweep / "trials" / "0003") == ("quickstart/sweep-lr", "0003")
    assert place_of(sweep / "trials" / "0003" / "seed_1") == ("quickstart/sweep-lr", "0003/seed_1")
    assert place_of(tmp_path / "suite" / "a") == ("suite", "a")
    assert place_of(tmp_path / "suite") == (None, "suite")


def test_tensorboard_holds_figures_tables_and_numbers(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    own = trained(run, "cv.folds=2", "trainer.max_epochs=1", "logger=tensorboard", "data.n_train=80", "peft=coeff")
    for folder, name in ((run, "run"), (run / "fold_1", "run/fold_1")):
        events = EventAccumulator(str(run / "tensorboard" / name), {"images": 0, "tensors": 0}).Reload()
        pictures = {path.stem: path for path in (folder / "plots").glob("*.png")}
        assert {f"plots/{stem}" for stem in pictures} == set(events.Tags()["images"]) and "confusion" in pictures
        with Image.open(io.BytesIO(events.Images("plots/confusion")[0].encoded_image_string)) as stored:
            with Image.open(pictures["confusion"]) as original:
                assert stored.convert("RGB").tobytes() == original.convert("RGB").tobytes()
        (text,) = events.Tensors("tables/folds/text_summary")[0].tensor_proto.string_val
        rows = json.loads((run / "fold_1" / "fold.json").read_text())["row"] if name != "run" else own["folds"][0]
        assert text.decode().splitlines()[2].strip("| ").split(" | ") == [str(value) for value in rows.values()]
    summary = EventAccumulator(str(run / "tensorboard" / "run")).Reload()
    assert summary.Scalars("results/value")[0].value == pytest.approx(own["value"])


def test_the_csv_logger_writes_the_table_of_the_folds(tmp_path: Path) -> None:
    own = trained(tmp_path / "run", "cv.folds=2", "trainer.max_epochs=1", "data.n_train=80", "peft=none")
    with (tmp_path / "run" / "folds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in own["folds"]] == rows


@pytest.mark.slow
def test_wandb_offline_holds_pictures_tables_and_the_adapter(tmp_path: Path) -> None:
    """In a process of its own, with neither account nor home: wandb reads its environment once."""
    run = tmp_path / "run"
    logger = ["logger=wandb", "logger.log_adapter=true", "cv.folds=2", "trainer.max_epochs=1", "data.n_train=80"]
    hidden = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = {"HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path / "data")}
    home["NETRC"] = str(tmp_path / "netrc")
    came = command("train", *QUICK, *logger, "peft=[coeff,lora]", f"run_dir={run}", env=hidden | home)
    assert came.returncode == 0, came.stderr
    assert came.stdout == f"{run}\n"
    media = sorted(path for path in (run / "wandb").glob("offline-run-*/files/media/images/plots/*.png"))
    held: dict[Path, set[bytes]] = {}
    for path in media:
        held.setdefault(path.parents[4], set()).add(path.read_bytes())
    folders = [run, run / "fold_0", run / "fold_1"]
    plots = [{path.read_bytes() for path in (folder / "plots").glob("*.png")} for folder in folders]
    assert len(held) == 3 and sorted(map(sorted, held.values())) == sorted(map(sorted, plots))
    tables = list((run / "wandb").glob("offline-run-*/files/media/table/tables/folds_*.table.json"))
    assert sorted(len(json.loads(path.read_text())["data"]) for path in tables) == [1, 1, 2]
    staged = {path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    for folder in folders[1:]:
        assert (folder / "adapter" / "coeff" / "adapter_model.safetensors").read_bytes() in staged
    assert (run / "results.json").read_bytes() in staged
