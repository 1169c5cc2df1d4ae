"""Methods that choose by the training data what they train, from the command line to the files."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import QUICK, lasting, results, trained
from small import coeft as command

import coeft.train
from coeft import load_adapter
from coeft.assemble import Assembled, build_backbone, restore
from coeft.cli.compose import compose
from coeft.data._part import Part
from coeft.evaluate import evaluate
from coeft.module import TuningModule
from coeft.run import Run
from coeft.train import Interrupted, resume, train

GLOBAL = ["peft=[lora,sparse,spt]", "peft.lora.rank=2", "peft.sparse.scope=global", "peft.sparse.density=0.05"]
SMALL = ["peft.spt.rank=1", "peft.spt.density=0.05", "peft.spt.calibration_batch_size=8"]


@pytest.mark.slow
def test_masks_are_chosen_on_the_training_part_of_the_fold_and_come_back_when_a_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = [*GLOBAL, *SMALL, "cv.folds=2", "trainer.max_epochs=2"]
    parts: list[set[str]] = []
    calibrate, original = coeft.train.calibrate, TuningModule.training_step

    def noted(built: Assembled, part: Part) -> None:
        parts.append(set(part.names.tolist()))
        calibrate(built, part)

    monkeypatch.setattr(coeft.train, "calibrate", noted)
    whole = trained(tmp_path / "whole", *extra)
    assert len(parts) == 2 and not parts[0] & parts[1]  # each fold trains on the other one
    assert sum(map(len, parts)) == sum(fold["n_train"] for fold in whole["folds"])

    indices = [
        load_file(tmp_path / "whole" / f"fold_{fold}" / "adapter" / "sparse" / "adapter_model.safetensors")
        for fold in (0, 1)
    ]
    names = [name for name in indices[0] if name.endswith("indices")]
    assert any(indices[0][name].shape != indices[1][name].shape for name in names)
    assert sum(indices[0][name].shape[1] for name in names) == sum(indices[1][name].shape[1] for name in names)

    for epoch in (0, 1):  # before the first checkpoint, and after it

        def stop(self: TuningModule, batch: dict, batch_idx: int, epoch: int = epoch) -> torch.Tensor:
            if self.fold == 1 and self.current_epoch == epoch and batch_idx == 1:
                raise KeyboardInterrupt
            return original(self, batch, batch_idx)

        run = tmp_path / f"stopped_{epoch}"
        monkeypatch.setattr(TuningModule, "training_step", stop)
        [composition] = compose([*QUICK, *extra, f"run_dir={run}"])
        with pytest.raises(Interrupted, match="coeft resume"):
            train(composition.config)
        monkeypatch.setattr(TuningModule, "training_step", original)
        resume(run)
        assert lasting(results(run)) == lasting(whole)
        for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
            assert path.read_bytes() == (run / path.relative_to(tmp_path / "whole")).read_bytes(), path

    monkeypatch.setattr(coeft.train, "calibrate", lambda built, part: pytest.fail("files say what is trained"))
    assert evaluate(tmp_path / "whole", {})["heldout"] == whole["heldout"]
    trained(tmp_path / "on", *GLOBAL, *SMALL, "trainer.max_epochs=1", f"init_from={tmp_path / 'whole/fold_0/adapter'}")


def test_load_adapter_takes_what_is_trained_from_the_files(tmp_path: Path) -> None:
    trained(tmp_path / "run", *GLOBAL, *SMALL, "trainer.max_epochs=1")
    run = Run.open(tmp_path / "run")
    built, _ = restore(run.config, run.adapter())
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = built.backbone.model.eval()(images)
    fresh = build_backbone(run.config).model
    assert torch.equal(load_adapter(fresh, run.adapter())(images), expected)
    assert command("export", "model", tmp_path / "run", "--out", tmp_path / "model") == 0


def test_dry_run_shows_what_was_chosen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert command("train", *QUICK, *GLOBAL, *SMALL, "dry_run=true") == 0
    shown = capsys.readouterr().err
    counts = [int(count) for count in re.findall(r"(\d+) entries by gradient", shown)]
    assert len(counts) == 4 and sum(counts) == round(0.05 * 2 * 4 * 32**2)
    assert "rank 1" in shown and "entries or rank" not in shown
