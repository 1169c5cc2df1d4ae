"""Validation accuracy by learning rate: how the defaults of peft.*.lr and optim.lr were chosen.

    python benchmarks/learning_rates.py OUT.json [--weights-b FILE] [--models A B]

Every cell is the mean and standard deviation, over three folds of twenty epochs, of the best accuracy on the inner
validation part; the held-out folds play no part in the choice. Two models and two data sets, in three settings:

  A, digits        the small ViT of the package (8 heads), pre-trained on all of Fashion-MNIST; 600 digits
  B, digits        another small ViT (4 heads), pre-trained on Fashion-MNIST's classes 0 to 4; 600 digits
  B, fashion 5-9   the same on 600 images of Fashion-MNIST's classes 5 to 9

Model B is trained first unless --weights-b names its weights. Cells that OUT.json holds already are not run again.
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
FOLDS = [
    "cv.folds=3", "cv.val_fraction=0.25", "trainer.max_epochs=20", "trainer.progress=false", "data.n_train=600",
    "data.batch_size=32",
]  # fmt: skip
FASHION = ["data=fashion_mnist", "data.splits.test=null", "data.classes=[5,6,7,8,9]"]
SETTINGS = {
    "A, digits": ["backbone=vit_mini", "data=digits", *PIXELS, *FOLDS],
    "B, digits": [*B, "data=digits", *PIXELS, *FOLDS],
    "B, fashion 5-9": [*B, *FASHION, *PIXELS, *FOLDS],
}
HEAD = "optim.head.lr=0.01"  # the head's own rate while a method's is varied
GRIDS: dict[str, tuple[list[str], str, list[float]]] = {
    "head alone": (["peft=none"], "optim.head.lr", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "coeff": (["peft=[coeff]", HEAD], "peft.coeff.lr", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0]),
    "lora": (["peft=[lora]", HEAD], "peft.lora.lr", [1e-3, 3e-3, 1e-2]),
    "coeff beside lora": (["peft=[coeff,lora]", HEAD, "peft.lora.lr=0.003"], "peft.coeff.lr", [1e-3, 3e-3, 1e-2, 3e-2]),
    "bitfit": (["peft=[bitfit]", HEAD], "peft.bitfit.lr", [1e-3, 3e-3, 1e-2]),
    "full": (["peft=full", HEAD], "peft.full.lr", [3e-4, 1e-3, 3e-3]),
}


def pretrain_b(folder: Path) -> Path:
    """Train model B; return its weights as a file for backbone.weights."""
    run = folder / "model_b"
    line = ["recipe=pretrain/fashion_mnist_vit", *B, "backbone.pretrained=false", "data.classes=[0,1,2,3,4]", *PIXELS]
    if coeft(["train", *line, "trainer.max_epochs=8", f"run_dir={run}"]) != 0:
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


def table(cells: dict[str, dict[str, list[float]]]) -> str:
    """The cells as Markdown, a row per stack and rate."""
    lines = ["| stack | learning rate | " + " | ".join(SETTINGS) + " |", "|---|---|" + "---|" * len(SETTINGS)]
    for stack, (_, key, rates) in GRIDS.items():
        for rate in rates:
            row = []
            for setting in SETTINGS:
                values = cells.get(f"{stack}, {rate:g}", {}).get(setting)
                row.append(f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" if values else "-")
            lines.append(f"| {stack} | `{key}={rate:g}` | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the cells, continued if it exists")
    parser.add_argument("--weights-b", type=Path, help="weights of model B")
    parser.add_argument("--models", nargs="+", choices=["A", "B"], default=["A", "B"])
    arguments = parser.parse_args()
    cells = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = arguments.weights_b or (pretrain_b(folder) if "B" in arguments.models else None)
        for stack, (peft, key, rates) in GRIDS.items():
            for rate in rates:
                row = cells.setdefault(f"{stack}, {rate:g}", {})
                for number, (setting, options) in enumerate(SETTINGS.items()):
                    if setting[0] not in arguments.models or setting in row:
                        continue
                    run = folder / f"{len(cells)}-{number}"
                    extra = [f"backbone.weights={weights}"] if setting[0] == "B" else []
                    if coeft(["train", *options, *extra, *peft, f"{key}={rate}", f"run_dir={run}"]) != 0:
                        raise SystemExit(f"{stack} at {rate} failed in {setting}")
                    row[setting] = best_validation(run)
                    arguments.out.write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
