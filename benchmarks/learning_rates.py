"""Validation accuracy by learning rate: how the defaults of peft.*.lr and optim.lr were chosen.

    python benchmarks/learning_rates.py [--out FILE] [--weights-b FILE] [--quick]

Every cell is the mean and standard deviation, over the folds, of the best accuracy on the inner validation part; the
held-out folds play no part in the choice. Two models and two data sets, in three settings:

  A  the small ViT of the package (8 heads), pre-trained on all of Fashion-MNIST      -> digits
  B  another small ViT (4 heads), pre-trained on Fashion-MNIST's classes 0 to 4       -> digits
  B                                                     -> 1,000 images of Fashion-MNIST's classes 5 to 9

Model B is trained first unless --weights-b names its weights (a safetensors file of timm names).
"""

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

from coeft.cli.main import main as coeft
from coeft.export import export_weights

B = [
    "backbone=timm", "backbone.name=vit_tiny_patch16_224",
    "backbone.options={img_size: 28, patch_size: 7, embed_dim: 96, depth: 4, num_heads: 4}",
]  # fmt: skip
PIXELS = ["data.resize=squash", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
SETTINGS = {
    "A, digits": ["recipe=quickstart"],
    "B, digits": ["recipe=quickstart", *B, *PIXELS],
    "B, fashion 5-9": [
        *B,
        "data=fashion_mnist",
        "data.classes=[5,6,7,8,9]",
        "data.n_train=1000",
        *PIXELS,
        "cv.folds=5",
    ],
}
GRIDS = {
    "head alone": ("peft=none", "optim.lr", [1e-3, 3e-3, 1e-2, 3e-2]),
    "coeff": ("peft=[coeff]", "peft.coeff.lr", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "lora": ("peft=[lora]", "peft.lora.lr", [3e-4, 1e-3, 3e-3, 1e-2]),
    "coeff beside lora": ("peft=[coeff,lora]", "peft.coeff.lr", [1e-3, 3e-3, 1e-2, 3e-2]),
    "bitfit": ("peft=[bitfit]", "peft.bitfit.lr", [1e-3, 3e-3, 1e-2]),
    "full": ("peft=full", "peft.full.lr", [1e-4, 3e-4, 1e-3]),
}


def pretrain_b(folder: Path) -> Path:
    """Train model B; return its weights as a file for backbone.weights."""
    run = folder / "model_b"
    arguments = ["recipe=pretrain/fashion_mnist_vit", *B, "backbone.pretrained=false", "data.classes=[0,1,2,3,4]"]
    if coeft(["train", *arguments, *PIXELS, "trainer.max_epochs=8", f"run_dir={run}"]) != 0:
        raise SystemExit("pre-training of model B failed")
    return export_weights(run, folder / "model_b.safetensors")


def best_validation(run: Path) -> list[float]:
    """The best validation accuracy of each fold."""
    best: dict[str, float] = {}
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["val/accuracy"]:
                best[row["fold"]] = max(best.get(row["fold"], 0.0), float(row["val/accuracy"]))
    return list(best.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the cells as JSON")
    parser.add_argument("--weights-b", type=Path, help="weights of model B")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    cells: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = arguments.weights_b or pretrain_b(folder)
        for stack, (peft, key, rates) in GRIDS.items():
            cells[stack] = {}
            for rate in rates:
                cells[stack][f"{rate:g}"] = row = {}
                for number, (setting, options) in enumerate(SETTINGS.items()):
                    run = folder / f"{stack}-{rate}-{number}".replace(" ", "_")
                    extra = [f"backbone.weights={weights}"] if "backbone=timm" in options else []
                    code = coeft(
                        ["train", *options, *extra, peft, f"{key}={rate}", f"trainer.max_epochs={arguments.epochs}",
                         "trainer.progress=false", f"run_dir={run}"]
                    )  # fmt: skip
                    row[setting] = best_validation(run) if code == 0 else []
                shown = [
                    f"{statistics.fmean(v):.4f} ± {statistics.stdev(v):.4f}" if v else "failed" for v in row.values()
                ]
                print(f"| {stack} | {rate:g} | " + " | ".join(shown) + " |", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
