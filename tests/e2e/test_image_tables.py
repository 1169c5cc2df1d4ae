"""Images that a table names: numbers and several labels learnt by a vision transformer, from the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from small import TINY, coeft, results

ROWS = 120
TABLE = [*TINY, "data=table", "data.input=file", "data.resize=squash", "data.batch_size=16", "trainer.progress=false"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, with the ink of each as a number and its parity and size as labels."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    with (folder / "digits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "ink", "tags"])
        for number in range(ROWS):
            pixels = digits.images[number] * (255 / 16)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            tags = [name for name, holds in (("odd", digits.target[number] % 2), ("dark", pixels.mean() > 80)) if holds]
            writer.writerow([f"{number}.png", 100 + pixels.mean(), ";".join(tags)])
    return folder / "digits.csv"


def test_numbers_of_images_are_learnt_in_folds(table, tmp_path, capsys):
    chosen = ["task=regression", "data.label=ink", "peft=full", "cv.folds=2", "trainer.max_epochs=6"]
    assert coeft("train", *TABLE, *chosen, f"data.path={table}", f"run_dir={tmp_path / 'run'}") == 0
    found = results(tmp_path / "run")
    assert found["metric"] == "mse" and found["heldout"]["pearson"] > 0.5 and len(found["folds"]) == 2
    assert found["heldout"]["mae"] < 30  # the numbers lie around 180
    capsys.readouterr()
    assert coeft("predict", tmp_path / "run", table.parent / "0.png") == 0
    header, row = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["input", "prediction"] and 130 < float(row[1]) < 230


def test_several_labels_of_images_are_learnt(table, tmp_path):
    chosen = ["task=multi_label", "data.label=tags", "data.label_separator=;", "peft=full", "trainer.max_epochs=2"]
    line = ["train", *TABLE, *chosen, f"data.path={table}", "data.n_test=20", f"run_dir={tmp_path / 'run'}"]
    assert coeft(*line, "data.on_error=skip") == 0
    assert {"exact_match", "micro_f1", "mean_average_precision"} <= set(results(tmp_path / "run")["test"])


def test_a_missing_image_is_named_with_its_table(table, tmp_path, capsys):
    wrong = table.with_name("wrong.csv")
    wrong.write_text("file,ink\n0.png,1\nnowhere.png,2\n" + "1.png,3\n" * 9)
    assert (
        coeft("train", *TABLE, "task=regression", "data.label=ink", f"data.path={wrong}", f"run_dir={tmp_path}/r") == 2
    )
    message = capsys.readouterr().err
    assert "nowhere.png" in message and "data.on_error=skip" in message
