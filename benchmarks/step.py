"""One training step of every stack: against its floor, two forward passes, and against stock peft's LoRA.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--models vit_small vit_base smollm2] [--repeats 3] [--out step.json]

A step is forward, loss, backward, clipping and AdamW, as `coeft train` does them. The floor is twice the forward pass
of the model without a stack and without gradients, in the same precision: a frozen model needs its forward and a
backward to activations, which is as much arithmetic. Stock peft is its LoRA (rank 8, the same layers) in a plain
PyTorch loop, under torch.autocast for bf16. Random weights. Medians of interleaved runs, in CPU seconds of one
thread, which other programs on the machine disturb less than wall-clock time; printed as ratios. Measured on the CPU
only.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from coeft.adapt import Stack
from coeft.backbones import _hf, _timm
from coeft.methods.coeff import Coeff
from coeft.methods.full import Full
from coeft.methods.lora import LoRA
from coeft.precision import computing, store

CPU = torch.device("cpu")
STACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "coeff": {"coeff": Coeff()},
    "lora": {"lora": LoRA()},
    "coeff,lora": {"coeff": Coeff(), "lora": LoRA()},
    "full": {"full": Full()},
}
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


class Case:
    """A model's shapes: how to build it, a batch for it, and its loss."""

    def __init__(self, name: str, batch: int | None) -> None:
        self.name = name
        self.text = name == "smollm2"
        self.batch = batch or {"vit_small": 4, "vit_base": 2, "smollm2": 1}[name]
        generator = torch.Generator().manual_seed(0)
        if self.text:
            self.inputs = torch.randint(0, 49152, (self.batch, 512), generator=generator)
        else:
            self.inputs = torch.randn(self.batch, 3, 224, 224, generator=generator)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.text:
            return LlamaForCausalLM._from_config(LlamaConfig(**SMOLLM2))
        return timm.create_model(f"{self.name}_patch16_224", num_classes=10)

    def backbone(self) -> Any:
        return _hf.describe(self.model()) if self.text else _timm.describe(self.model())

    def forward(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.inputs, use_cache=False).logits if self.text else model(self.inputs)

    def loss(self, model: nn.Module) -> Tensor:
        logits = self.forward(model).float()
        if self.text:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.inputs[:, 1:].flatten())
        return F.cross_entropy(logits, torch.arange(self.batch) % 10)


def stepper(case: Case, model: nn.Module, context: Callable[[], Any], head: list[nn.Parameter]) -> Callable[[], None]:
    """One optimizer step of what is trainable."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained or not head
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        with context():
            loss = case.loss(model)
        if optimizer is None:
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def forms(case: Case, precision: str, stacks: list[str]) -> dict[str, Callable[[], None]]:
    """What is timed."""
    found: dict[str, Callable[[], None]] = {}
    plain = case.backbone()
    plain.model.requires_grad_(False).eval()
    if precision == "bf16":
        store(plain)

    def forward() -> None:
        with torch.no_grad(), computing(precision, CPU):
            case.forward(plain.model)

    found["forward"] = forward
    for name in stacks:
        if name == "none" and case.text:
            continue  # a language model without a stack has nothing to train
        backbone, stack = case.backbone(), Stack(STACKS[name])
        stack.attach(backbone, 0)
        if precision == "bf16":
            store(backbone)
        head = list(backbone.head_parameters().values())
        found[name] = stepper(case, backbone.model, lambda: computing(precision, CPU), head)
    options: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if not case.text:
        options = {"target_modules": r"blocks\..*\.(qkv|attn\.proj)", "modules_to_save": ["head"]}
    stock = peft.get_peft_model(case.model(), peft.LoraConfig(r=8, lora_alpha=16, **options))

    def cast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    found["stock peft lora"] = stepper(case, stock, cast, [])
    return found


def seconds(todo: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(repeats + 1):
        for name, form in todo.items():
            start = time.process_time()
            form()
            if turn:  # the first warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small", "vit_base", "smollm2"])
    parser.add_argument("--stacks", nargs="+", default=list(STACKS), choices=list(STACKS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("step.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("| model, batch | precision | stack | step / (2 forward) | step / stock peft LoRA | fp32 step / step |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        case = Case(name, options.batch)
        exact: dict[str, float] = {}
        for precision in options.precisions:
            times = seconds(forms(case, precision, options.stacks), options.repeats)
            exact = exact or times
            for stack, value in times.items():
                if stack == "forward":
                    continue
                row = {
                    "model": name, "batch": case.batch, "precision": precision, "stack": stack, "seconds": value,
                    "over_floor": value / (2 * times["forward"]), "over_stock": value / times["stock peft lora"],
                    "gain": exact[stack] / value,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"| {name}, {case.batch} | {precision} | {stack} | {row['over_floor']:.2f} | "
                    f"{row['over_stock']:.2f} | {row['gain']:.2f} |", flush=True,
                )  # fmt: skip
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
