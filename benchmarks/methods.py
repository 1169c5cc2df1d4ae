"""What a training step costs under every method of the zoo: its time beside the head alone, and what it keeps.

    python benchmarks/methods.py [OUT.json] [--recipe quickstart/zoo] [--rounds 15] [--threads 1]

A model is made for each member of the suite, from its config and on its data. The steps, each a forward, a backward
and an update of AdamW on a batch of the recipe, are taken in turn, one of each member a round; a member's time is its
median over the rounds in processor time, as a ratio to the first member's. Kept are the bytes that autograd saves for
the backward pass, each storage once, without parameters and buffers; they are the same on every machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from activations import saved_bytes
from torch import nn

from coeft.adapt import count_parameters
from coeft.assemble import Assembled
from coeft.cli.compose import compose
from coeft.config import TrainConfig
from coeft.data._part import Batch
from coeft.train import prepare


class Step(nn.Module):
    """One training step of a member; as a module, the forward pass and the loss alone."""

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        prepared = prepare(cfg)
        self.built: Assembled = prepared.first
        self.batch: Batch = prepared.folds[0].train.batch(range(cfg.data.batch_size))
        self.module = self.built.module.train()
        self.optimizer = torch.optim.AdamW(each for each in self.module.parameters() if each.requires_grad)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.module.task.loss(self.module(batch), batch, training=True)

    def seconds(self) -> float:
        """Take a step; processor time, which other work on the machine disturbs less."""
        begun = time.process_time()
        self.optimizer.zero_grad()
        self(self.batch).backward()
        self.optimizer.step()
        return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="JSON file")
    parser.add_argument("--recipe", default="quickstart/zoo", help="a suite")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (composition,) = compose([f"recipe={options.recipe}"])
    members = composition.members or {"run": composition.config}
    steps = {name: Step(cfg) for name, cfg in members.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 2):
        for name, step in steps.items():
            seconds = step.seconds()
            if number >= 2:  # the first ones warm up
                times[name].append(seconds)
    first = statistics.median(next(iter(times.values())))
    rows: dict[str, Any] = {}
    for name, step in steps.items():
        rows[name] = {
            "parameters": count_parameters(step.built.backbone, step.built.stack).adapter,
            "step": round(statistics.median(times[name]) / first, 3),
            "kept_mib": round(saved_bytes(step, step.batch, [])[0] / 2**20, 2),
            "merges": all(attached.merges for attached in step.built.stack.attachments),
        }
    found = {"recipe": options.recipe, "torch": torch.__version__, "threads": options.threads, "members": rows}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':24}{'parameters':>12}{'step':>8}{'kept, MiB':>12}  merges")
    for name, row in rows.items():
        print(f"{name:24}{row['parameters']:12,}{row['step']:8.2f}{row['kept_mib']:12.1f}  {row['merges']}")


if __name__ == "__main__":
    main()
