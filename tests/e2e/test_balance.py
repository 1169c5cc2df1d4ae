"""Uneven classes made even in folds, in several processes, and in runs that are stopped."""

from pathlib import Path

import numpy as np
import pytest
from following import fork
from killing import content, differing, draw_nothing
from PIL import Image
from sklearn.datasets import load_digits
from small import TINY, coeft, lasting, results

from coeft.cli.compose import compose
from coeft.train import Epoch, resume, train

LINE = [*TINY, "data=image_folder", "data.resize=squash", "trainer.progress=false", "peft.coeff.dropout=0"]
LINE += ["cv.folds=2", "data.batch_size=16", "trainer.micro_batch_size=4", "trainer.max_epochs=2"]
EVEN = ["data.balance=1", "task.class_weight=balanced", "task.metric=balanced_accuracy"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coeft.plots._save", draw_nothing)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Many digits of one class and few of two others."""
    root, digits = tmp_path_factory.mktemp("uneven"), load_digits()
    for label, count in ((0, 50), (1, 12), (2, 7)):
        (root / f"digit {label}").mkdir()
        for number in np.flatnonzero(digits.target == label)[:count]:
            image = (digits.images[number] * (255 / 16)).astype(np.uint8)
            Image.fromarray(image).save(root / f"digit {label}" / f"{number}.png")
    return [*LINE, *EVEN, f"data.root={root}"]


@pytest.fixture(scope="module")
def whole(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("balance") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coeft.plots._save", draw_nothing)
        assert coeft("train", *line, f"run_dir={run}") == 0
    return run


def test_a_run_that_is_stopped_comes_to_the_same(line: list[str], whole: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: Epoch) -> None:
        if (epoch.fold, epoch.epoch) == (1, 0):
            raise Stop

    [composition] = compose([*line, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(Stop):
        train(composition.config, watch=stop)
    resume(tmp_path / "run")
    assert not differing(content(whole), content(tmp_path / "run")) and results(whole)["metric"] == "balanced_accuracy"


def test_two_processes_are_one(line: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork(monkeypatch)
    assert coeft("train", *line, "trainer.devices=2", "trainer.strategy=ddp", f"run_dir={tmp_path / 'two'}") == 0
    one, two = (lasting(results(run)) for run in (whole, tmp_path / "two"))
    assert one["folds"] == two["folds"]
    assert two["heldout"]["loss"] == pytest.approx(one["heldout"]["loss"], rel=2e-5)


def test_without_classes_there_is_nothing_to_make_even(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("file,size\n" + "x.png,1\n" * 3)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    chosen = ["data=table", f"data.path={tmp_path / 't.csv'}", "data.input=file", "data.label=size", "task=regression"]
    assert coeft("train", *TINY, *chosen, "data.balance=1") == 2
    assert "data.balance=1 draws by classes, but the task learns number; set it to 0" in capsys.readouterr().err
