"""What a user gets wrong, by the installed command: exit code 2, one short message, no traceback, nothing left."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image
from small import TINY, coeft, command, results

CONFIG_MISTAKES = {
    "a setting that does not exist": (["recipe=quickstart", "peft.lora.rnk=4"], "rank"),
    "a recipe that does not exist": (["recipe=vtab/cifar10"], "vtab/cifar100"),
    "a method that does not exist": (["recipe=quickstart", "peft=lroa"], "lora"),
    "a text for a number": (["recipe=quickstart", "optim.lr=abc"], "optim.lr must be a number"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_wrong_config(mistake: str, tmp_path: Path) -> None:
    arguments, hint = CONFIG_MISTAKES[mistake]
    run = command("train", *arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert hint in run.stderr and "Traceback" not in run.stderr and len(run.stderr.splitlines()) <= 3
    assert run.stdout == "" and os.listdir(tmp_path) == []


def folder_of(root: Path, *parts: str) -> Path:
    """An image folder with two classes in each part; no parts: class folders at its top."""
    for part in parts or ("",):
        for name in ("cat", "dog"):
            for number in range(6):
                path = root / part / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (24, 24), (number * 20, 90, 200 if name == "cat" else 10)).save(path)
    return root


def absent(root: Path) -> Path:
    return root / "absent"


def empty_class(root: Path) -> Path:
    folder_of(root)
    (root / "emu").mkdir()
    return root


def truncated(root: Path) -> Path:
    path = folder_of(root) / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return root


def other_labels(root: Path) -> Path:
    folder_of(root, "train", "test")
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root


DATA_MISTAKES = {
    "a folder that is not there": (absent, "absent"),
    "an empty class folder": (empty_class, "emu"),
    "a truncated JPEG": (truncated, "3.jpg"),
    "labels that differ between splits": (other_labels, "wolf"),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_wrong_data(mistake: str, tmp_path: Path) -> None:
    make, named = DATA_MISTAKES[mistake]
    root = make(tmp_path / "images")
    run = command("train", *TINY, "data=image_folder", f"data.root={root}", "run_dir=run", cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert named in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == "" and not (tmp_path / "run").exists()


def test_paths_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "Bilder für = [mich]")
    recipe = tmp_path / "my recipe ñ.yaml"
    recipe.write_text("defaults:\n  - override /data: image_folder\n  - override /peft: [lora]\n")
    run_dir = tmp_path / "läufe" / "erster Lauf"
    run = command(
        "train", f"recipe=./{recipe.name}", *TINY, f"data.root={root}", "trainer.max_epochs=1", f"run_dir={run_dir}",
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(run_dir)  # the path is the last line on standard output
    assert results(run_dir)["status"] == "completed"


def test_unreadable_files_are_skipped_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = truncated(tmp_path / "images")
    line = [*TINY, "data=image_folder", f"data.root={root}", "data.on_error=skip", "trainer.max_epochs=1"]
    assert coeft("train", *line, "trainer.progress=false", f"run_dir={tmp_path / 'run'}") == 0
    assert "3.jpg" in capsys.readouterr().err
    assert "3.jpg" in (tmp_path / "run" / "log.txt").read_text()


def test_an_image_size_that_does_not_fit(tmp_path: Path) -> None:
    assert coeft("train", *TINY, "data=digits", "data.image_size=18", f"run_dir={tmp_path / 'run'}") == 2
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    assert coeft("train", *TINY, "data=digits", f"run_dir={tmp_path / 'run'}") == 2
    assert os.listdir(tmp_path / "run") == ["mine.txt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft=lora", r"peft.lora.target_modules=['attn\.qvk$']"], "qvk"),
        (["peft=coeff", "peft.coeff.layers=[7]"], "no layer 7"),
        (["trainer.patience=2", "cv.val_fraction=0"], "trainer.patience needs validation data"),
        (["data.batch_size=30", "trainer.micro_batch_size=7"], "micro_batch_size"),
        (["backbone.name=resnet18", "backbone.options={}", "peft=coeff"], "resnet18|ResNet"),
        (["cv.folds=300"], "fold"),
    ],
)
def test_what_cannot_be_trained_leaves_no_run_behind(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coeft("train", *TINY, "data=digits", *overrides, f"run_dir={tmp_path / 'run'}") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_top5_of_few_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "images")
    assert coeft("train", *TINY, "data=image_folder", f"data.root={root}", "task.metric=top5", "run_dir=run") == 2
    assert "top5 needs more than 5 classes" in capsys.readouterr().err
