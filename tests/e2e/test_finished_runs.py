"""What is done with a finished run: eval, predict, export, load_adapter, stock peft."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import QUICK, coeft, results, trained
from torch import Tensor, nn

import coeft as library
from coeft.assemble import restore
from coeft.errors import UserError
from coeft.evaluate import evaluate
from coeft.run import Run

OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small ViT, the classifier left out."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **OPTIONS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(model.state_dict(), path)
    return path


def weights(base: Path) -> list[str]:
    return ["backbone.pretrained=true", f"backbone.weights={base}"]


@pytest.fixture(scope="module")
def standard(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard run with coeff and LoRA on slices of qkv, and a test split."""
    run = tmp_path_factory.mktemp("standard") / "run"
    trained(run, *weights(base), "peft=[coeff,lora]", "peft.lora.qkv=[q,v]", "data.n_test=50", "peft.coeff.lr=0.05")
    return run


@pytest.fixture(scope="module")
def folds(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds with coeff alone."""
    run = tmp_path_factory.mktemp("folds") / "run"
    trained(run, *weights(base), "cv.folds=2", "peft=coeff")
    return run


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA alone, of rank 3, on the whole fused qkv."""
    run = tmp_path_factory.mktemp("lora") / "run"
    trained(run, *weights(base), "peft=lora", "peft.lora.rank=3")
    return run


def plain_model(base: Path, num_classes: int = 10) -> nn.Module:
    """The base model as any timm user would make it."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **OPTIONS)
    model.load_state_dict(load_file(base), strict=False)
    return model.eval()


def images() -> Tensor:
    return torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run_logits(run: Path, fold: int | None = None) -> Tensor:
    opened = Run.open(run)
    built, _ = restore(opened.config, opened.adapter(fold))
    return built.backbone.model.eval()(images())


def test_eval_repeats_what_training_reported(standard: Path, folds: Path) -> None:
    assert evaluate(standard, {})["test"] == results(standard)["test"]
    assert evaluate(folds, {})["heldout"] == results(folds)["heldout"]
    assert coeft("eval", standard) == 0


def test_eval_on_other_data(standard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    pixels = load_digits()
    for number in range(60):
        folder = tmp_path / "digits" / str(pixels.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.images[number] * 255 / 16).round().astype(np.uint8)).save(folder / f"{number}.png")
    assert coeft("eval", standard, "data=image_folder", f"data.root={tmp_path / 'digits'}", "data.resize=squash") == 0
    other = evaluate(standard, {"data": "image_folder", "data.root": str(tmp_path / "digits"), "data.resize": "squash"})
    assert other["heldout"] is None and other["test"]["accuracy"] != results(standard)["test"]["accuracy"]
    shutil.move(tmp_path / "digits" / "3", tmp_path / "digits" / "three")
    assert coeft("eval", standard, "data=image_folder", f"data.root={tmp_path / 'digits'}") == 2
    assert "not trained on: three" in capsys.readouterr().err


def test_load_adapter_restores_everything(standard: Path, base: Path) -> None:
    model = library.load_adapter(plain_model(base, num_classes=3), standard / "adapter")
    torch.testing.assert_close(model(images()), run_logits(standard), rtol=1e-5, atol=1e-5)
    assert (model(images()) - plain_model(base)(images())).abs().max() > 1e-2


def test_export_and_reload_of_one_fold(folds: Path, base: Path, tmp_path: Path) -> None:
    assert coeft("export", "adapter", folds, "--out", tmp_path / "out") == 2  # which fold?
    assert coeft("export", "adapter", folds, "--fold", 1, "--out", tmp_path / "out é") == 0
    assert coeft("export", "adapter", folds, "--fold", 1, "--out", tmp_path / "out é") == 2  # never overwrites
    assert coeft("export", "adapter", folds, "--fold", 7, "--out", tmp_path / "other") == 2
    model = library.load_adapter(plain_model(base), tmp_path / "out é")
    torch.testing.assert_close(model(images()), run_logits(folds, fold=1), rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "out é" / "adapter_config.json").exists()  # coeff alone: nothing for stock peft
    config = json.loads((tmp_path / "out é" / "coeff" / "adapter_config.json").read_text())
    assert config["peft_type"] == "COEFF"
    alphas = load_file(tmp_path / "out é" / "coeff" / "adapter_model.safetensors")
    assert [tuple(alpha.shape) for alpha in alphas.values()] == [(4, 4), (4, 4)]


@pytest.mark.parametrize("name", ["lora", "standard"])
def test_the_lora_part_loads_in_stock_peft(
    name: str, request: pytest.FixtureRequest, base: Path, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    assert coeft("export", "adapter", run, "--out", tmp_path / "out") == 0
    model = plain_model(base)
    head = load_file(tmp_path / "out" / "head.safetensors")
    model.load_state_dict(head, strict=False)
    opened = Run.open(run)
    built, _ = restore(opened.config, opened.adapter())
    ours = built.backbone.model.eval()
    if name == "standard":  # without α what remains is the LoRA part
        with pytest.warns(UserWarning, match="other_parts_need_coeft"):
            stock = peft.PeftModel.from_pretrained(model, tmp_path / "out")
        for parameter_name, parameter in ours.named_parameters():
            if parameter_name.endswith("coeff_alpha"):
                assert parameter.abs().max() > 1e-3
                parameter.data.zero_()
    else:
        stock = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    with torch.no_grad():
        theirs = stock.eval()(images())
        plain = plain_model(base)
        plain.load_state_dict(head, strict=False)
        assert (theirs - plain(images())).abs().max() > 1e-3
        torch.testing.assert_close(theirs, ours(images()), rtol=1e-5, atol=1e-5)


def test_the_model_card_says_how_to_make_the_base_model(standard: Path) -> None:
    card = (standard / "adapter" / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("model = timm.create_model"))
    made = eval(line.removeprefix("model = "), {"timm": timm})  # noqa: S307 (our own text)
    assert made.state_dict()["pos_embed"].shape == (1, 17, 32)
    assert "base.safetensors" in card


def test_another_base_model_is_refused(standard: Path, base: Path) -> None:
    changed = plain_model(base)
    with torch.no_grad():
        changed.blocks[0].mlp.fc1.weight.mul_(1.5)  # type: ignore[union-attr,operator,index]
    with pytest.raises(UserError, match="other weights"):
        library.load_adapter(changed, standard / "adapter")
    library.load_adapter(changed, standard / "adapter", check=False)
    wider = timm.create_model("vit_tiny_patch16_224", num_classes=10, **OPTIONS | {"embed_dim": 64})
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.proj\.bias is \[64\], not \[32\]"):
        library.load_adapter(wider, standard / "adapter")
    deeper = timm.create_model("vit_tiny_patch16_224", num_classes=10, **OPTIONS | {"depth": 3})
    with pytest.raises(UserError, match="the model has blocks.2"):
        library.load_adapter(deeper, standard / "adapter")


def test_the_fingerprint_ignores_precision_head_and_image_size(standard: Path, base: Path) -> None:
    manifest = json.loads((standard / "adapter" / "coeft.json").read_text())["base_model"]
    from coeft.adapter_io import check_base, fingerprint

    for model in (plain_model(base).to(torch.bfloat16), plain_model(base, num_classes=77)):
        check_base(manifest, fingerprint(model, "head"), "it")
    larger = timm.create_model("vit_tiny_patch16_224", num_classes=10, **OPTIONS | {"img_size": 32})
    larger.load_state_dict({k: v for k, v in load_file(base).items() if k != "pos_embed"}, strict=False)
    check_base(manifest, fingerprint(larger, "head"), "it")


DAMAGE = {
    "no manifest": (lambda a: (a / "coeft.json").unlink(), "has no coeft.json"),
    "not JSON": (lambda a: (a / "coeft.json").write_text("{"), "not a JSON file"),
    "newer": (lambda a: _edit(a / "coeft.json", format=99), "newer than this coeft reads"),
    "unknown method": (lambda a: _edit(a / "coeft.json", stack=[{"kind": "lroa"}]), "lora"),
    "wrong setting": (lambda a: _edit(a / "coeft.json", stack=[{"kind": "lora", "rank": -1}]), "rank"),
    "stack of nothing": (lambda a: _edit(a / "coeft.json", stack="coeff"), "'stack' must be a list"),
    "truncated": (lambda a: _cut(a / "adapter_model.safetensors"), "not a readable safetensors file"),
    "no tensors": (lambda a: (a / "coeff" / "adapter_model.safetensors").unlink(), "no such file"),
    "no head": (lambda a: (a / "head.safetensors").unlink(), "no such file"),
    "no head and no word of it": (lambda a: _headless(a), "'outputs' must be a number of outputs"),
    "other head": (lambda a: _head(a), "head.safetensors"),
    "alpha lacks": (lambda a: _drop(a / "coeff" / "adapter_model.safetensors"), "missing"),
    "alpha of another shape": (lambda a: _reshape(a / "coeff" / "adapter_model.safetensors"), r"\[4, 4\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(damage: str, standard: Path, base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(standard / "adapter", adapter)
    spoil, message = DAMAGE[damage]
    spoil(adapter)
    with pytest.raises(UserError, match=message):
        library.load_adapter(plain_model(base), adapter)


def test_predictions(standard: Path, folds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "some images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"ü {number}.png")
    table = tmp_path / "table.csv"
    table.write_text("id,input\n1,some images/ü 2.png\n")
    capsys.readouterr()
    assert coeft("predict", standard, folder, table) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["input"]).name for row in rows] == ["ü 0.png", "ü 1.png", "ü 2.png", "ü 2.png"]
    for row in rows:
        shares = {name: float(row[name]) for name in map(str, range(10))}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["prediction"] == max(shares, key=shares.__getitem__)
    assert coeft("predict", folds, folder, "--out", tmp_path / "out.csv") == 0
    averaged = list(csv.DictReader((tmp_path / "out.csv").open()))
    opened = Run.open(folds)
    from coeft.data._data import load_inputs
    from coeft.data._images import ImageEncoder, image_inputs

    means = []
    for fold in (0, 1):
        built, _ = restore(opened.config, opened.adapter(fold))
        part = load_inputs(image_inputs([str(folder)]), ImageEncoder(built.backbone.preprocessing))
        with torch.no_grad():
            means.append(built.module.eval()(part.batch(range(len(part)))).double().softmax(-1))
    expected = torch.stack(means).mean(0)
    got = torch.tensor([[float(row[str(k)]) for k in range(10)] for row in averaged], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert coeft("predict", folds, folder, "--out", tmp_path / "out.csv") == 2  # never overwrites
    assert coeft("predict", standard, tmp_path / "absent.png") == 2
    assert coeft("predict", standard, table, tmp_path / "empty.csv") == 2


def test_a_run_that_did_not_complete_is_refused(tmp_path: Path, standard: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(standard, copy)
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match="did not complete; continue it by `coeft resume"):
        Run.open(copy)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="run directory"):
            Run.open(path)


def test_dry_run_shows_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert coeft("train", *QUICK, "peft=[coeff,lora]", "dry_run=true", f"run_dir={run}") == 0
    shown = capsys.readouterr().err
    assert not run.exists()
    for text in (
        "blocks.0.attn",
        "fused if large, else maps",
        "rank 8",
        "trainable 3,434",
        "estimated peak memory",
        "train",
        "every method was called",
    ):
        assert text in shown, text


def test_merged_weights_are_those_of_the_run(lora: Path, base: Path, standard: Path, tmp_path: Path) -> None:
    from coeft.export import export_weights

    path = export_weights(lora, tmp_path / "merged.safetensors")
    model = plain_model(base)
    model.load_state_dict(load_file(path) | load_file(lora / "adapter" / "head.safetensors"))
    torch.testing.assert_close(model(images()), run_logits(lora), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="coeff cannot be folded"):
        export_weights(standard, tmp_path / "other.safetensors")


def test_layers_limit_what_is_attached(base: Path, tmp_path: Path) -> None:
    limited = trained(tmp_path / "run", *weights(base), "peft=[coeff,lora]", "peft.coeff.layers=[-1]",
                      "peft.lora.layers=[0]", "trainer.max_epochs=1")  # fmt: skip
    assert limited["adapter_params"] == 16 + 8 * (32 + 96 + 32 + 32)
    alphas = load_file(tmp_path / "run" / "adapter" / "coeff" / "adapter_model.safetensors")
    assert list(alphas) == ["base_model.model.blocks.1.attn.coeff_mix.coeff_alpha"]
    assert replace(Run.open(tmp_path / "run").config).peft["coeff"].layers == [-1]


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _headless(adapter: Path) -> None:
    (adapter / "head.safetensors").unlink()
    manifest = json.loads((adapter / "coeft.json").read_text())
    del manifest["outputs"]
    (adapter / "coeft.json").write_text(json.dumps(manifest))


def _head(adapter: Path) -> None:
    head = load_file(adapter / "head.safetensors")
    head["head.weight"] = head["head.weight"][:, :-1].contiguous()
    save_file(head, adapter / "head.safetensors", metadata={"class_names": json.dumps(list(map(str, range(10))))})


def _drop(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def _reshape(path: Path) -> None:
    save_file({name: tensor[:2].contiguous() for name, tensor in load_file(path).items()}, path)
