"""Command lines that train in about a second: a tiny random ViT on some of the digits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from coeft.cli.main import main

TINY = [
    "backbone=timm",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.pretrained=false",
    "backbone.options={img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 4}",
]
DIGITS = ["data=digits", "data.n_train=200", "data.resize=squash", "data.batch_size=32"]
QUICK = [*TINY, *DIGITS, "trainer.max_epochs=2", "trainer.progress=false", "optim.lr=3e-3"]


def coeft(*arguments: str | Path) -> int:
    """Run a command line in this process; its exit code."""
    return main([str(argument) for argument in arguments])


def trained(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Train a small run that must succeed; its results.json."""
    assert coeft("train", *QUICK, *overrides, f"run_dir={run_dir}") == 0
    return results(run_dir)


def results(run_dir: Path) -> dict[str, Any]:
    """RUN/results.json."""
    return json.loads((run_dir / "results.json").read_text())


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """What of results.json must be equal when the same command runs again."""
    return {k: v for k, v in values.items() if k not in ("wall_s", "samples_per_s") and not k.startswith("peak_")}


def command(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own."""
    line = [sys.executable, "-m", "coeft.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **kwargs)
