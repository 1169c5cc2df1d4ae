"""The whole command `coeft train` with its defaults against a hand-written loop with stock peft.

    OMP_NUM_THREADS=1 python benchmarks/train.py [--model vit_small_patch16_224] [--train 128] [--epochs 2] \\
        [--repeats 3] [--weights FILE] [--out train.json]

Both train LoRA of rank 8 on the same layers of the same model, on the same images in batches of 16, with the same
constant rate, and validate on the same others after every epoch, in one thread; each run is a process of its own,
interleaved. The order of the images and the start of LoRA and head are drawn by each in its own way. The loop is the
float32 one that people write (`loop` below). Samples per second are of the steps and the validation, after the imports,
by CPU seconds, which other programs disturb less than wall-clock time. "outside of steps" is what else `coeft train`
does, from its first line of work to results.json, in seconds and as a share. Random weights unless --weights names a
file of the model, so that the accuracies only say that both learn alike.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def settings(options: argparse.Namespace) -> list[str]:
    """What both train on."""
    line = [
        "backbone=timm", f"backbone.name={options.model}", "backbone.pretrained=false", "peft=lora", "data=digits",
        f"data.n_train={options.train}", f"data.n_val={options.val}", "data.image_size=224", "data.batch_size=16",
        f"trainer.max_epochs={options.epochs}", "trainer.progress=false", "trainer.threads=1", "cv.val_fraction=0",
        "optim.schedule=constant", "optim.warmup_fraction=0", "optim.lr=1e-3", "optim.head.lr=1e-3",
    ]  # fmt: skip
    return line + ([f"backbone.weights={options.weights}"] if options.weights else [])


def coeft_run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`coeft train` in this process."""
    from coeft.cli.main import main
    from coeft.module import TuningModule

    inside, began = [0.0], [0.0]

    def enter(self: Any) -> None:
        began[0] = time.process_time()

    start_step, end_step = TuningModule.on_train_batch_start, TuningModule.on_train_batch_end

    def starts(self: Any, batch: Any, index: int) -> None:
        began[0] = time.process_time()
        start_step(self, batch, index)

    def ends(self: Any, outputs: Any, batch: Any, index: int) -> None:
        end_step(self, outputs, batch, index)
        inside[0] += time.process_time() - began[0]

    def leave(self: Any) -> None:
        inside[0] += time.process_time() - began[0]

    TuningModule.on_train_batch_start, TuningModule.on_train_batch_end = starts, ends  # type: ignore[method-assign]
    TuningModule.on_validation_start, TuningModule.on_validation_end = enter, leave  # type: ignore[method-assign]
    import coeft.train  # noqa: F401 (the imports come before the clock)

    begin = time.process_time()
    if main(["train", *settings(options), f"run_dir={folder}"]) != 0:
        raise SystemExit("coeft train failed")
    total = time.process_time() - begin
    results = json.loads((folder / "results.json").read_text())
    return {
        "samples_per_s": options.train * options.epochs / inside[0],
        "outside_s": total - inside[0],
        "outside_share": (total - inside[0]) / total,
        "accuracy": results["value"],
    }


def loop(options: argparse.Namespace) -> dict[str, Any]:
    """What people write by hand."""
    import peft
    import timm
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from coeft.cli.compose import compose
    from coeft.train import prepare

    torch.set_num_threads(1)
    torch.manual_seed(0)
    [composition] = compose(settings(options))
    prepared = prepare(composition.config)
    fold, pixels = prepared.folds[0], prepared.first.backbone.preprocessing
    assert fold.val is not None and pixels is not None
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (pixels.mean, pixels.std))
    sets = []
    for part in (fold.train, fold.val):
        batch = part.batch(range(len(part)))
        sets.append(TensorDataset((batch["pixel_values"] / 255 - mean) / std, batch["labels"]))
    train, val = sets
    del prepared, fold, part, batch
    model = timm.create_model(options.model, pretrained=False, num_classes=10)
    if options.weights:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(options.weights), strict=False)
    layers = r"blocks\..*\.(qkv|attn\.proj)"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers, modules_to_save=["head"])
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    begin = time.process_time()
    accuracy = 0.0
    for _ in range(options.epochs):
        model.train()
        for x, y in DataLoader(train, batch_size=16, shuffle=True):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for x, y in DataLoader(val, batch_size=16):
                right += int((model(x).argmax(-1) == y).sum())
        accuracy = right / options.val
    seconds = time.process_time() - begin
    return {"samples_per_s": options.train * options.epochs / seconds, "accuracy": accuracy}


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--weights")
    parser.add_argument("--train", type=int, default=128)
    parser.add_argument("--val", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("train.json"))
    parser.add_argument("--only", choices=["coeft", "loop"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        done = coeft_run(options, options.folder) if options.only == "coeft" else loop(options)
        done["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("RESULT", json.dumps(done))
        return
    runs: dict[str, list[dict[str, float]]] = {"coeft": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for which, found in runs.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--folder", f"{folder}/{turn}"]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                [line] = [line for line in out.splitlines() if line.startswith("RESULT ")]
                found.append(json.loads(line.removeprefix("RESULT ")))
    ours, theirs = ({key: statistics.median(run[key] for run in found) for key in found[0]} for found in runs.values())
    ratio = ours["samples_per_s"] / theirs["samples_per_s"]
    print(f"{options.model}, {options.train} images, {options.epochs} epochs, batches of 16\n")
    print("| | coeft train | loop with stock peft, fp32 | ratio |\n|---|---|---|---|")
    for key, form in {"samples_per_s": ".1f", "peak_rss_mb": ".0f", "accuracy": ".3f"}.items():
        print(f"| {key} | {ours[key]:{form}} | {theirs[key]:{form}} | {ours[key] / max(theirs[key], 1e-9):.2f} |")
    print(f"| outside of steps | {ours['outside_s']:.1f} s, {100 * ours['outside_share']:.0f} % | | |")
    share = 100 * ours["outside_s"] / (180 + ours["outside_s"])
    print(f"| the same in a training of three minutes | {share:.0f} % | | |")
    options.out.write_text(json.dumps({"coeft": runs["coeft"], "loop": runs["loop"], "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
