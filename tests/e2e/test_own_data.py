"""A user's own folder with all that goes wrong in one: named in the check, left out or a reason to stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import TINY, coeft, command, results

LINE = ["train", *TINY, "data=image_folder", "peft=none", "data.batch_size=16", "trainer.max_epochs=1"]
LINE += ["trainer.progress=false"]
CLASSES = ["Rose", "müde Katze", "собака 犬"]
BROKEN = "train/Rose/kaputt ß.jpg: not an image in a format that Pillow reads"
EMPTY = "train/leere Klasse: the class folder has no image (it is empty)"
LEAK = "train/Rose/Bild 0 ä.png = test/müde Katze/Kopie von 0.png"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 + 4 images a class; one file is no image, a class is empty, a test image is one of another class's."""
    root = tmp_path_factory.mktemp("own") / "Meine Bilder [neu]"
    for s, (split, count) in enumerate((("train", 10), ("test", 4))):
        for c, name in enumerate(CLASSES):
            for number in range(count):
                picture(root / split / name / f"Bild {number} ä.png", 1000 * s + 100 * c + number)
        (root / split / "leere Klasse").mkdir()
    (root / "train" / "Rose" / "kaputt ß.jpg").write_text("no image")
    shutil.copy(root / "train" / "Rose" / "Bild 0 ä.png", root / "test" / "müde Katze" / "Kopie von 0.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check(text: str) -> str:
    """What a dry run said of the data, which must name everything; spaces and line breaks are one."""
    said = " ".join(text.split())
    for found in (
        "Rose 10, müde Katze 10, собака 犬 10", "Rose 4, müde Katze 5, собака 犬 4", "unreadable: 1", BROKEN,
        "class folders without a sample: 2", EMPTY, EMPTY.replace("train/", "test/"), f"train/test: {LEAK}",
        "1 of the 13 test samples are also in the train split", "suspicious labels: 1",
        "train/Rose/Bild 0 ä.png is Rose; test/müde Katze/Kopie von 0.png is müde Katze",
    ):  # fmt: skip
        assert found in said, found
    return said


def test_the_check_names_everything_and_then_stops(root: Path, tmp_path: Path, cache: Path, capsys) -> None:
    run = tmp_path / "run"
    assert coeft(*LINE, f"data.root={root}", "dry_run=true", f"run_dir={run}") == 2
    said = check(capsys.readouterr().err)
    assert said.endswith(
        f"3 things stop the run; repair or remove, or set data.on_error=skip to go on without: {BROKEN} {EMPTY} "
        + EMPTY.replace("train/", "test/")
    )
    assert not run.exists()
    [sheet] = (cache / "sheets").iterdir()
    with Image.open(sheet) as image:
        shown = np.asarray(image.convert("RGB"))
    # the first example of the first class stands where the model's 16 x 16 pixels are drawn
    assert shown.shape[0] > 4 * 104 and len(np.unique(shown[60:150, 200:290].reshape(-1, 3), axis=0)) > 50
    assert str(sheet) in said.replace(" ", "") or sheet.name in said


def test_the_check_goes_on_if_the_run_would(root: Path, tmp_path: Path, capsys) -> None:
    line = [
        *LINE,
        f"data.root={root}",
        "data.on_error=skip",
        "cv.folds=20",
        "dry_run=true",
        f"run_dir={tmp_path / 'r'}",
    ]
    assert coeft(*line) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3 classes have fewer than cv.folds=20: Rose has 10" in said  # in the summary, before folds are made
    assert "cv.folds=20 stratified folds need 20 samples of each class" in said
    assert coeft(*line, "cv.folds=2") == 0
    said = check(capsys.readouterr().err)
    assert "fold 1: train 13, val 2, held out 15, test 13" in said and "every method was called" in said
    assert not (tmp_path / "r").exists()


def test_an_unreadable_file_and_an_empty_class_stop_the_run(root: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert coeft(*LINE, f"data.root={root}", f"run_dir={run}") == 2
    said = capsys.readouterr().err
    assert all(f"{root}/{split}/leere Klasse: the class folder has no image" in said for split in ("train", "test"))
    filled = tmp_path / "filled"
    shutil.copytree(root, filled)
    for split in ("train", "test"):
        (filled / split / "leere Klasse").rmdir()
    assert coeft(*LINE, f"data.root={filled}", f"run_dir={run}") == 2
    assert BROKEN in capsys.readouterr().err and not run.exists()


@pytest.mark.slow
def test_or_are_left_out_and_recorded_by_the_real_command(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "Lauf 1"
    done = command(*LINE, f"data.root={root}", "data.on_error=skip", "cv.folds=2", f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run)
    for said in (done.stderr, (run / "log.txt").read_text(encoding="utf-8")):
        for found in (BROKEN, EMPTY, LEAK, "1 content has two labels"):
            assert found in said, found
    left_out = json.loads((run / "environment.json").read_text(encoding="utf-8"))["left_out"]
    assert left_out == [BROKEN, EMPTY, EMPTY.replace("train/", "test/")]
    folds = results(run)["folds"]
    assert sum(fold["n_test"] for fold in folds) == 30  # every image that can be read is held out once
    assert all(fold["n_train"] + fold["n_val"] == 15 for fold in folds)
    assert len(results(run)["test"]["per_class_accuracy"]) == 3


def test_images_of_a_class_without_training_images_are_left_out(root: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    picture(copy / "test" / "leere Klasse" / "doch eins.png", 5)
    line = [*LINE, f"data.root={copy}", "data.on_error=skip", "dry_run=true"]
    assert coeft(*line) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "test/leere Klasse/doch eins.png: the training split has no image of its class" in said
    assert "unreadable: 2" in said and "class folders without a sample: 1" in said


def test_a_table_with_columns_of_labels_is_checked_alike(root: Path, tmp_path: Path, cache: Path, capsys) -> None:
    names = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.png"))
    table = root / "Tabelle.csv"
    rows = [
        f"{name},{number % 2},{int(number < 20)},{'test' if number > 24 else 'train'}"
        for number, name in enumerate(names)
    ]
    rows += [f"{names[0]},0,0,test", "train/fehlt.png,0,1,train", "train/Rose/kaputt ß.jpg,1,1,train"]
    table.write_text("\n".join(["Datei,Odd,odd ,Teil", *rows]), encoding="utf-8")
    line = [
        *LINE,
        "data=table",
        f"data.path={table}",
        "data.input=Datei",
        "data.label=[Odd,'odd ']",
        "task=multi_label",
    ]
    line += ["data.split_column=Teil", "data.balance=0.5", "task.class_weight=balanced"]
    line.remove("data=image_folder")
    assert coeft(*line, "dry_run=true") == 2
    said = " ".join(capsys.readouterr().err.split())
    for found in (
        "no such image", "fehlt.png", "kaputt ß.jpg): not an image", "unreadable: 2", "2 things stop the run",
        "classes that differ by case or spaces alone: 'Odd', 'odd '", "1 content has two labels",
        "is odd ; Tabelle.csv:32", "is none", "Odd 12, odd 20",
    ):  # fmt: skip
        assert found in said, found
    assert len([*(cache / "sheets").iterdir()]) == 1
    assert coeft(*line, "data.on_error=skip", f"run_dir={tmp_path / 'run'}") == 0
    assert "micro_f1" in results(tmp_path / "run")["test"]
