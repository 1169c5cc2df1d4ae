"""trainer.cache_frozen and trainer.compile: the same results, sooner."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import QUICK, TINY, coeft, lasting, trained

from coeft import compiled, frozen
from coeft.cli.compose import compose
from coeft.config import TrainConfig
from coeft.errors import UserError
from coeft.train import Prepared, prepare

LAST = ["peft=[coeff,lora]", "peft.coeff.layers=[-1]", "peft.lora.layers=[-1]"]
DEEPER = ["backbone.options={img_size: 16, patch_size: 4, embed_dim: 32, depth: 3, num_heads: 4}"]


def adapters(run: Path) -> dict[str, bytes]:
    """The contents of the tensor files below a run."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("adapter/**/*.safetensors"))}


@pytest.mark.parametrize(
    "line",
    [["peft=none", "cv.folds=2"], [*LAST, "trainer.precision=bf16"]],
    ids=["head, two folds", "last block, bf16"],
)
def test_kept_features_change_no_bit(line: list[str], tmp_path: Path) -> None:
    line = [*DEEPER, *line, "data.n_train=100"]
    plain = trained(tmp_path / "plain", *line, "trainer.cache_frozen=false")
    kept = trained(tmp_path / "kept", *line, "trainer.cache_frozen=true")
    assert lasting(plain) == lasting(kept)
    assert adapters(tmp_path / "plain") == adapters(tmp_path / "kept") != {}
    assert (tmp_path / "kept" / "log.txt").read_text().count("computed once") == 1  # for all folds
    assert "computed once" not in (tmp_path / "plain" / "log.txt").read_text()


def prepared(*overrides: str) -> tuple[TrainConfig, Prepared]:
    """A run on some digits before its first step."""
    line = [*TINY, *DEEPER, "data=digits", "data.n_train=40", "data.resize=squash", "data.batch_size=16"]
    cfg = compose([*line, *overrides])[0].config
    return cfg, prepare(cfg)


def place(*overrides: str) -> frozen.Cut | None:
    """Where the model of a config may start."""
    _, run = prepared(*overrides)
    return frozen.find(run.first, run.folds[0].train)


def test_the_place_is_the_first_that_is_trained() -> None:
    found = place("peft=none")
    assert found is not None and found.name == "head"
    assert list(found.skipped) == ["blocks.0", "blocks.1", "blocks.2"]
    found = place("peft=lora", "peft.lora.layers=[1]")
    assert found is not None and found.name == "blocks.1" and list(found.skipped) == ["blocks.0"]
    assert place("peft=lora") is None
    assert place("peft=vpt") is None
    options = DEEPER[0].replace("depth: 3", "depth: 3, proj_drop_rate: 0.1")
    assert place("peft=none", options) is None


def test_finding_the_place_leaves_no_trace() -> None:
    _, run = prepared(*LAST)
    module = run.first.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generators, modes = torch.get_rng_state(), [each.training for each in module.modules()]
    assert frozen.find(run.first, run.folds[0].train) is not None
    assert modes == [each.training for each in module.modules()] and module.cut is None
    assert torch.equal(generators, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.model.blocks)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [(["peft=lora"], "no block behind others"), (["peft=none", "data.augment=[flip]"], "data.augment")],
)
def test_a_training_that_cannot_keep_features_says_why(overrides: list[str], reason: str) -> None:
    cfg, run = prepared(*overrides, "trainer.cache_frozen=true")
    with pytest.raises(UserError, match=rf"trainer\.cache_frozen=true: .*{re.escape(reason)}"):
        frozen.Kept(cfg, run.folds).use(run.first, run.folds[0])
    cfg, run = prepared(*overrides)
    assert frozen.Kept(cfg, run.folds).use(run.first, run.folds[0]) is run.folds[0]


def test_auto_keeps_no_more_than_fits_and_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(built: Any, cut: Any, batch: Any) -> Any:
        seen.append(len(batch["pixel_values"]))
        return inputs_of(built, cut, batch)

    inputs_of = frozen.inputs_of
    monkeypatch.setattr(frozen, "inputs_of", counted)
    cfg, run = prepared("peft=none", "cv.folds=2")
    kept = frozen.Kept(cfg, run.folds)
    for fold in run.folds:  # the second model finds what the first one kept
        used = kept.use(run.first, fold)
        assert used.train.batch([0, 1])["features"].shape == (2, 32)
        assert used.heldout is not None and len(used.heldout) == len(fold.heldout or [])
    assert sum(seen) == 1 + 40  # one to know the size
    monkeypatch.setattr(frozen, "free_memory", lambda: 1000)
    assert frozen.Kept(cfg, run.folds).use(run.first, run.folds[0]) is run.folds[0]


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tracing and differentiating parts of torch.compile; the code of a compiler is in the slow test."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    line = ["peft=[coeff,lora]", "data.n_train=80", "trainer.max_epochs=1"]
    torch._dynamo.reset()
    plain, fast = trained(tmp_path / "plain", *line), trained(tmp_path / "fast", *line, "trainer.compile=true")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert fast["validation"] == pytest.approx(plain["validation"], abs=0.05)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


@pytest.mark.slow
def test_a_run_in_compiled_code_repeats(tmp_path: Path) -> None:
    line = ["peft=[coeff,lora]", "data.n_train=80", "trainer.max_epochs=1", "trainer.compile=true"]
    torch._dynamo.reset()
    first = trained(tmp_path / "a", *line)
    torch._dynamo.reset()
    assert lasting(trained(tmp_path / "b", *line)) == lasting(first)
    plain = trained(tmp_path / "c", *line[:-1])
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "c"), rel=1e-3)
    assert first["folds"][0]["n_train"] == plain["folds"][0]["n_train"]


def losses(run: Path) -> list[float]:
    """The training losses of a run."""
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    place = header.index("train/loss")
    return [float(row[place]) for row in rows if row[place]]


def test_without_a_compiler_there_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert coeft("train", *QUICK, "trainer.compile=true", f"run_dir={tmp_path / 'run'}") == 2
    message = capsys.readouterr().err
    assert "no-such-compiler" in message and "trainer.compile" in message
    assert not (tmp_path / "run").exists()
