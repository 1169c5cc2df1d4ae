"""recipe=vtab/cifar100 on a small copy in the local VTAB-1k folder format, and without any copy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small import coeft, results

OPTIONS = "backbone.options={depth: 1, embed_dim: 24, num_heads: 3}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training, 8 validation and 16 test images of four classes, told apart by their colour."""
    folder = tmp_path_factory.mktemp("VTAB 1k") / "cifar100"
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {}
    for name, count in (("train800", 24), ("val200", 8), ("test", 16)):
        for number in range(count):
            label = number % 4
            pixels = rng.integers(0, 60, (32, 32, 3)) + np.array([label & 1, label >> 1, 0]) * 150
            path = Path("images") / name / f"{number}.jpg"
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / path)
            lists.setdefault(name, []).append(f"{path} {label}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1, embed_dim=24, num_heads=3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_it_trains_on_the_local_folder(root: Path, weights: Path, tmp_path: Path) -> None:
    line = ["recipe=vtab/cifar100", f"data.root={root}", f"backbone.weights={weights}", OPTIONS]
    assert coeft("train", *line, "dry_run=true") == 0
    code = coeft("train", *line, "trainer.max_epochs=2", "trainer.progress=false", f"run_dir={tmp_path / 'run'}")
    assert code == 0
    [row] = results(tmp_path / "run")["folds"]
    assert (row["n_train"], row["n_val"], row["n_test"]) == (24, 8, 16)
    config = (tmp_path / "run" / "config.yaml").read_text()
    for pinned in ("resize: squash", "interpolation: bilinear", "train: train800", "val: val200", "image_size: 224"):
        assert pinned in config, pinned


def test_all_thousand_images_without_validation(root: Path, weights: Path, tmp_path: Path) -> None:
    code = coeft(
        "train", "recipe=vtab/cifar100", f"data.root={root}", f"backbone.weights={weights}", OPTIONS,
        "data.splits.train=train800val200", "data.splits.val=null", "cv.val_fraction=0", "trainer.max_epochs=1",
        "trainer.progress=false", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 0
    [row] = results(tmp_path / "run")["folds"]
    assert (row["n_train"], row["n_val"], row["best_epoch"]) == (32, 0, 0)


def test_a_wrong_line_in_a_list_is_named(root: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "cifar100" / "val200.txt"
    text = path.read_text()
    try:
        path.write_text(text.replace("images/val200/2.jpg 2", "images/val200/2.jpg two"))
        line = ["recipe=vtab/cifar100", f"data.root={root}", f"backbone.weights={weights}", OPTIONS]
        assert coeft("train", *line) == 2
    finally:
        path.write_text(text)
    message = capsys.readouterr().err
    assert "val200.txt" in message and "3" in message and "two" in message


def test_without_network_and_copy_it_names_both_ways_out(weights: Path, tmp_path: Path) -> None:
    """At once: the answer comes before torch, whose import is most of a start, is asked for."""
    line = ["train", "recipe=vtab/cifar100", f"backbone.weights={weights}", OPTIONS]
    script = (
        f"import sys; from coeft.cli.main import main; code = main({line!r}); "
        "assert 'torch' not in sys.modules, 'torch was imported first'; sys.exit(code)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, run.stderr
    assert "data.root=" in run.stderr and "uoft-cs/cifar100" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "runs").exists()
