"""Sounds from a folder to predictions: pictures of them for models of images, features for the AST."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small import TINY, coeft, lasting, results
from sounds import rotors, tone, tones, write
from tiny_hf import tiny_model

from coeft.assemble import encoder, restore
from coeft.cli.compose import compose
from coeft.data._audio import sound_inputs
from coeft.data._data import load_inputs
from coeft.run import Run

EVERY = "data.augment=[time_shift,pitch,gain,noise,time_mask,frequency_mask]"
CONVOLUTIONAL = ["backbone=timm", "backbone.name=test_efficientnet", "backbone.pretrained=false", "data.image_size=32"]


SHARP = ["data.spectrogram.low=-60", "data.spectrogram.n_mels=16"]  # of tones in pictures of 16 x 16
VIT = "backbone.options={patch_size: 8, embed_dim: 96, depth: 4, num_heads: 4}"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten tones of half a second, two of each recording."""
    return tones(tmp_path_factory.mktemp("sounds") / "tönes [1]")


def line(root: Path, *more: str) -> list[str]:
    return [
        "data=audio_folder", f"data.root={root}", "data.seconds=0.5", "data.batch_size=8", "trainer.progress=false",
        "trainer.threads=1", "optim.lr=1e-2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with coeff and LoRA, two folds, all augmentations."""
    folder = tmp_path_factory.mktemp("audio") / "run"
    more = [
        "peft=[coeff,lora]",
        "cv.folds=2",
        "cv.val_fraction=0.2",
        "trainer.max_epochs=6",
        "peft.lora.lr=5e-3",
        *SHARP,
    ]
    assert coeft("train", *TINY, *line(sounds, *more, EVERY, "data.strength.probability=0.3"), f"run_dir={folder}") == 0
    return folder


def test_folds_on_spectrograms_beat_chance_and_leave_pictures(run: Path) -> None:
    found = results(run)
    assert len(found["folds"]) == 2 and [row["n_test"] for row in found["folds"]] == [15, 15]
    assert found["mean"] > 0.5 and found["std"] is not None  # chance is a third
    for name in ("spectrograms.png", "augmentations.png", "confusion.png"):
        with Image.open(run / "plots" / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50, name
    assert "16 mel bands (htk), 20 to 8000 Hz" in (run / "log.txt").read_text()
    manifest = json.loads((run / "fold_0" / "adapter" / "coeft.json").read_text())
    assert manifest["base_model"]["hearing"]["features"]["n_mels"] == 16
    assert "training clips" in (run / "fold_0" / "adapter" / "README.md").read_text()


def test_a_folder_and_a_file_of_sound_are_predicted(run: Path, sounds: Path, tmp_path: Path) -> None:
    assert coeft("predict", run, sounds, "--out", tmp_path / "all.csv") == 0
    rows = list(csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8")))
    assert len(rows) == 30
    right = [row["prediction"] == Path(row["input"]).parent.name for row in rows]
    assert sum(right) > 15
    for row in rows:
        assert sum(float(row[name]) for name in ("tone0", "tone1", "tone2")) == pytest.approx(1, abs=1e-4)
    file = sounds / "tone0" / "rec0_0.wav"
    assert coeft("predict", run, file, "--out", tmp_path / "one.csv") == 0
    [one] = csv.DictReader((tmp_path / "one.csv").open(encoding="utf-8"))
    [same] = [row for row in rows if row["input"] == one["input"]]
    assert one["prediction"] == same["prediction"]
    assert float(one["tone0"]) == pytest.approx(float(same["tone0"]), abs=1e-4)


def test_eval_measures_the_folds_again(run: Path, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coeft.evaluate import evaluate

    assert evaluate(run, {})["heldout"]["accuracy"] == pytest.approx(results(run)["mean"], abs=1e-6)
    other = evaluate(run, {"data.root": str(sounds), "data.n_train": 15})
    assert 0 <= other["test"]["accuracy"] <= 1


def test_an_adapter_and_a_model_are_exported(run: Path, tmp_path: Path) -> None:
    assert coeft("export", "adapter", run, "--fold", "1", "--out", tmp_path / "adapter") == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert coeft("export", "model", run, "--fold", "0", "--out", tmp_path / "model") == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_report_shows_spectrograms(run: Path, tmp_path: Path) -> None:
    assert coeft("report", run, "--out", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64" in page or "data:image/png;base64" in page
    assert "No attention maps" not in page


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_a_convolutional_network_learns_and_is_restored(peft: str, sounds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = line(
        sounds, f"peft={peft}", "trainer.max_epochs=1", "data.n_test=6", "data.n_train=8", "data.augment=[time_mask]"
    )
    assert coeft("train", *CONVOLUTIONAL, *more, f"run_dir={folder}") == 0
    found = results(folder)
    assert found["adapter_params"] > 0
    if peft == "lora":
        places = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
        assert places and all("conv" in place for place in places)
        assert found["adapter_params"] < 0.5 * found["total_params"]
    assert coeft("eval", folder) == 0


@pytest.mark.slow
def test_augmented_runs_repeat_to_the_bit(sounds: Path, tmp_path: Path) -> None:
    more = ["trainer.max_epochs=1", "data.n_train=8", "peft=[coeff]", "data.n_test=6", "data.strength.probability=1"]
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert coeft("train", *TINY, *line(sounds, *more, EVERY, f"seed={seed}"), f"run_dir={tmp_path / name}") == 0
        found.append(lasting(results(tmp_path / name)))
    assert found[0] == found[1] and found[0]["test"]["loss"] != found[2]["test"]["loss"]


# Audio Spectrogram Transformer


@pytest.fixture(scope="module")
def ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small one, with 50 frames of 16 bands."""
    folder = tmp_path_factory.mktemp("ast") / "model"
    tiny_model("ast", max_length=50).save_pretrained(folder)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=50, mean=-5.0, std=4.0)
    extractor.save_pretrained(folder)
    return folder


def test_ast_takes_its_own_features_and_its_stack(ast: Path, sounds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = line(sounds, "peft=[coeff,lora]", "trainer.max_epochs=1", "data.n_test=6", EVERY)
    assert coeft("train", "backbone=hf", f"backbone.name={ast}", *more, f"run_dir={folder}") == 0
    assert "16 mel bands (kaldi) in 50 frames of 10 ms, mean -5, std 4" in (folder / "log.txt").read_text()
    assert (folder / "plots" / "spectrograms.png").is_file() and (folder / "plots" / "coefficients.png").is_file()
    file = sounds / "tone1" / "rec1_0.wav"
    assert coeft("predict", folder, file, "--out", tmp_path / "one.csv") == 0
    assert coeft("export", "model", folder, "--coeff", "expand", "--out", tmp_path / "model") == 0
    # the exported folder by transformers alone: its extractor on the waveform, its model
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "model").eval()
    opened = Run.open(folder)
    built, names = restore(opened.config, opened.adapter())
    part = load_inputs(sound_inputs([file]), encoder(opened.config, built.backbone))
    waveform = part.fetch([0])[0]
    with torch.no_grad():
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        shares = torch.softmax(model(**inputs).logits[0].double(), 0)
    [row] = csv.DictReader((tmp_path / "one.csv").open())
    for name, share in zip(names, shares, strict=True):
        assert float(row[name]) == pytest.approx(float(share), abs=1e-3)
    assert model.config.id2label == {0: "tone0", 1: "tone1", 2: "tone2"}


@pytest.mark.parametrize("kind", ["picture", pytest.param("features", marks=pytest.mark.slow)])
def test_kept_features_of_frozen_layers_change_no_number(kind: str, ast: Path, sounds: Path, tmp_path: Path) -> None:
    model = TINY if kind == "picture" else ["backbone=hf", f"backbone.name={ast}"]
    more = line(sounds, "peft=none", "trainer.max_epochs=2", "data.n_train=12", "data.n_test=6")
    found = []
    for cached in ("true", "false"):
        folder = tmp_path / cached
        assert coeft("train", *model, *more, f"trainer.cache_frozen={cached}", f"run_dir={folder}") == 0
        found.append(lasting(results(folder)))
    assert found[0] == found[1]


def test_models_and_data_of_other_kinds_do_not_go_together(
    ast: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "x.png")
    images = ["data=image_folder", f"data.root={root}"]
    assert coeft("train", "backbone=hf", f"backbone.name={ast}", *images, "run_dir=x") == 2
    assert "takes sound: data=audio_folder has some" in capsys.readouterr().err
    assert coeft("train", "backbone=hf", f"backbone.name={ast}", *line(sounds, "data.seconds=2"), "run_dir=x") == 2
    assert "data.seconds=2 makes 198 frames" in capsys.readouterr().err
    assert coeft("train", *TINY, *line(sounds, "data.spectrogram.n_mels=600"), "run_dir=x") == 2
    assert "bands are too narrow" in capsys.readouterr().err


# What is wrong with files


def test_files_that_are_no_sound_are_named_and_may_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tones(tmp_path / "sounds", 2, 6)
    (root / "tone0" / "broken ü.wav").write_text("no sound at all")
    (root / "tone1" / "empty.flac").write_bytes(b"")
    (root / "tone1" / "notes.txt").write_text("not asked for")
    more = line(root, "trainer.max_epochs=1", "peft=none")
    assert coeft("train", *TINY, *more, f"run_dir={tmp_path / 'run'}") == 2
    told = capsys.readouterr().err
    for words in ("2 sounds cannot be read", "tone0/broken ü.wav: not a sound", "tone1/empty.flac: the file is empty"):
        assert words in told
    assert not (tmp_path / "run").exists()
    assert coeft("train", *TINY, *more, "data.on_error=skip", f"run_dir={tmp_path / 'run'}") == 0
    assert "tone1/notes.txt" in capsys.readouterr().err
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "unreadable, left out: tone0/broken ü.wav" in log
    assert coeft("predict", tmp_path / "run", root / "tone1" / "empty.flac") == 2
    assert "no input can be used; the first: " in (told := capsys.readouterr().err) and "empty.flac: the file" in told


def test_duplicates_and_counts_are_shown_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tones(tmp_path / "sounds", 2, 6)
    write(root / "tone1" / "again.wav", tone(500.0))
    write(root / "tone1" / "once more.wav", tone(500.0))
    assert coeft("train", *TINY, *line(root, "dry_run=true")) == 0
    told = capsys.readouterr().err
    assert "again.wav = tone1/once more.wav" in told and "tone0 6, tone1 8" in told
    assert "sound: 16000 Hz, clips of 0.5 s" in told


# Recipe and sweep


@pytest.mark.slow
def test_a_sweep_chooses_between_augmentations(sounds: Path, tmp_path: Path) -> None:
    more = line(sounds, "trainer.max_epochs=1", "data.n_train=12", "peft=none", "trainer.threads=1")
    chosen = ["sweep=audio", "sweep.n_trials=2", "sweep.pruner=none", f"run_dir={tmp_path / 'sweep'}"]
    assert coeft("sweep", *TINY, *more, *chosen) == 0
    trials = [path.parent for path in (tmp_path / "sweep" / "trials").rglob("results.json")]
    assert trials and all(isinstance(Run.open(path).config.data.augment, list) for path in trials)
    assert (tmp_path / "sweep" / "plots" / "space.png").is_file()


def test_the_recipes_name_three_augmentations_five_folds_and_every_model() -> None:
    [one] = compose(["recipe=fivefold/uav_audio"])
    assert (one.config.cv.folds, len(one.config.data.augment), [*one.config.peft]) == (5, 3, ["full"])
    [many] = compose(["recipe=fivefold/uav_audio_methods"])
    found = {name: (config.backbone.name.split("_")[0], [*config.peft]) for name, config in many.members.items()}
    assert found == {
        "vit_coeff_lora": ("vit", ["coeff", "lora"]),
        "efficientnet_full": ("efficientnet", ["full"]),
        "efficientnet_lora": ("efficientnet", ["lora"]),
        "ast_coeff_lora": ("MIT/ast-finetuned-audioset-10-10-0.4593", ["coeff", "lora"]),
    }


@pytest.mark.slow
def test_the_methods_of_the_recipe_separate_31_rotors_from_chance(tmp_path: Path) -> None:
    """Five folds each of EfficientNet-B0, full and by LoRA, and of a ViT by coeff and LoRA; chance is 0.032.

    Their pre-training is full fine-tuning from random weights on other clips of some of the hums, since weights that
    were trained on images cannot be had in tests.
    """
    from coeft.export import export_weights

    root = rotors(tmp_path / "rotors", clips=6)
    other = rotors(tmp_path / "others", 16, 10, seed=1)
    small: list[str] = ["data.seconds=0.5", "data.spectrogram.low=-70", "data.spectrogram.f_max=4000", "cv.folds=5"]
    models: dict[str, Any] = {
        "efficientnet": ["backbone=efficientnet_b0", "data.image_size=48"],
        "vit": [*TINY[:2], "data.image_size=64", VIT],
    }
    for name, model in models.items():
        run = tmp_path / f"{name} before"
        before = ["backbone.pretrained=false", "peft=full", "trainer.max_epochs=8", *small[:-1], "data.batch_size=16"]
        assert coeft("train", *model, *line(other, *before, "optim.lr=3e-3"), f"run_dir={run}") == 0
        export_weights(run, tmp_path / f"{name}.safetensors")
    tries = {
        "efficientnet_full": ("efficientnet", ["peft=full"]),
        "efficientnet_lora": ("efficientnet", ["peft=lora"]),
        "vit_coeff_lora": ("vit", ["peft=[coeff,lora]"]),
    }
    for name, (model, stack) in tries.items():
        weights = ["backbone.pretrained=true", f"backbone.weights={tmp_path / model}.safetensors"]
        more = line(root, "trainer.max_epochs=5", "data.augment=[time_shift,noise]", *small)
        assert coeft("train", *models[model], *weights, *stack, *more, f"run_dir={tmp_path / name}") == 0
        found = results(tmp_path / name)
        assert len(found["folds"]) == 5 and found["std"] is not None
        assert found["mean"] > 0.3, name
        assert min(row["value"] for row in found["folds"]) > 0.15, name
