"""Validation accuracy of every PEFT method by its learning rate: where the rates of quickstart/zoo come from.

    python benchmarks/method_rates.py OUT.json [--methods NAME ...]

The small ViT of the package on 800 of scikit-learn's digits: 400 to train on, 400 to validate on. Ten epochs, 130
optimizer steps of 32 images, cosine schedule, the head at 1e-2. A method climbs from the common rate, optim.lr, towards
the better neighbour until it gets worse; rates are half a decade apart. What OUT.json holds already is not run again.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from learning_rates import PIXELS, best_validation

from coeft.cli.main import main as coeft
from coeft.config import methods_by_name, preset

SETTING = [
    "backbone=vit_mini", "data=digits", *PIXELS, "data.n_train=800", "data.batch_size=32",
    "cv.val_fraction=0.5", "trainer.max_epochs=10", "trainer.progress=false", "trainer.threads=1", "optim.head.lr=0.01",
]  # fmt: skip
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
START = RATES.index(3e-3)
APART = ("hf", "full", "map")  # a bridge, no adapter, and a method that acts on another one's update


def accuracy(kind: str, rate: float, folder: Path) -> float:
    """Best validation accuracy of one run."""
    run = folder / f"{kind}-{rate:g}"
    if coeft(["train", *SETTING, f"peft=[{kind}]", f"peft.{kind}.lr={rate:g}", f"run_dir={run}"]) != 0:
        raise SystemExit(f"{kind} at {rate:g} failed")
    return best_validation(run)[0]


def climb(cells: dict[str, float], measure: Callable[[float], float]) -> None:
    """Fill `cells` by rate, from the start towards the better side until it falls."""
    position = START
    while True:
        for neighbour in (position - 1, position, position + 1):
            if 0 <= neighbour < len(RATES) and f"{RATES[neighbour]:g}" not in cells:
                cells[f"{RATES[neighbour]:g}"] = measure(RATES[neighbour])
        best = max(range(len(RATES)), key=lambda i: cells.get(f"{RATES[i]:g}", -1.0))
        if best == position:
            return
        position = best


def table(methods: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per method, a column per rate, the best in bold."""
    tried = [rate for rate in RATES if any(f"{rate:g}" in cells for cells in methods.values())]
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in tried) + " |", "|---|" + "---|" * len(tried)]
    for name, cells in sorted(methods.items()):
        best = max(cells.values())
        texts = [cells.get(f"{rate:g}") for rate in tried]
        shown = ["" if text is None else f"**{text:.3f}**" if text == best else f"{text:.3f}" for text in texts]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    names = [name for name in methods_by_name() if "kind" in preset(name) and name not in APART]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the cells, continued if it exists")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    cells: dict[str, dict[str, float]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.methods:

            def measure(rate: float, name: str = name) -> float:
                return accuracy(name, rate, Path(temporary))

            climb(cells.setdefault(name, {}), measure)
            arguments.out.write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
