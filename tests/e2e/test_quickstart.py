"""The main job: recipe=quickstart and its comparison of stacks, by the installed command on real digits."""

from pathlib import Path

import pytest
from small import coeft, command, lasting, results

SMALLER = ["data.n_train=900", "data.batch_size=32", "cv.folds=2", "trainer.progress=false"]


def test_coeff_and_lora_beat_the_head_alone(tmp_path: Path) -> None:
    for stack in ("peft=none", "peft=[coeff,lora]"):
        assert coeft("train", "recipe=quickstart", *SMALLER, stack, f"run_dir={tmp_path / stack}") == 0
    head, both = results(tmp_path / "peft=none"), results(tmp_path / "peft=[coeff,lora]")
    assert both["mean"] - head["mean"] > max(both["std"], head["std"])
    assert head["adapter_params"] == 0
    # 6 layers: alpha 8 x 8; LoRA of rank 8 on qkv (128 -> 384) and proj (128 -> 128)
    assert both["adapter_params"] == 6 * (64 + 8 * (128 + 384 + 128 + 128))


@pytest.mark.slow
def test_the_quickstart_twice(tmp_path: Path) -> None:
    runs = [command("train", "recipe=quickstart", f"run_dir={tmp_path / name}", cwd=tmp_path) for name in "ab"]
    for run, name in zip(runs, "ab", strict=True):
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == str(tmp_path / name)
        assert "mean ± sd" in run.stderr
    assert lasting(results(tmp_path / "a")) == lasting(results(tmp_path / "b"))
    assert results(tmp_path / "a")["mean"] > 0.9


@pytest.mark.slow
def test_the_comparison_of_stacks(tmp_path: Path) -> None:
    run = command("train", "recipe=quickstart/compare", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    members = results(tmp_path / "run")["members"]
    assert list(members) == ["none", "coeff", "lora", "coeff_lora", "full"]
    assert members["coeff_lora"]["mean"] - members["none"]["mean"] > members["coeff_lora"]["std"]
    assert members["coeff"]["mean"] - members["none"]["mean"] > members["coeff"]["std"]
    assert members["coeff"]["adapter_params"] == 384


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_a_thousand_images_of_fashion_mnist(tmp_path: Path) -> None:
    line = ["data=fashion_mnist", "data.n_train=1000", "data.n_test=500", "trainer.max_epochs=2", "trainer.threads=1"]
    assert coeft("train", *line, "peft=[coeff,lora]", "trainer.progress=false", f"run_dir={tmp_path / 'run'}") == 0
    values = results(tmp_path / "run")
    assert values["folds"][0]["n_train"] == 900 and values["folds"][0]["n_test"] == 500
    assert values["value"] > 0.6  # the small ViT knows these classes; chance is 0.1
