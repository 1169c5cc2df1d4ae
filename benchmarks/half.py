"""Plain attention in bf16 on the CPU: torch's own backward pass against that of coeft/attention/half.py.

    OMP_NUM_THREADS=1 python benchmarks/half.py [--repeats 5] [--out half.json]

Forward and backward, medians of interleaved runs, CPU milliseconds of one thread, with inputs laid out as the joint
projection of a ViT gives them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from coeft.attention.half import fast_attention

# batch, heads, tokens, head size, causal
SHAPES = [
    (64, 8, 17, 16, False), (16, 3, 65, 64, False), (4, 6, 197, 64, False), (1, 12, 577, 64, False),
    (1, 9, 512, 64, True), (1, 6, 2048, 64, False),
]  # fmt: skip


def run(shape: tuple[int, int, int, int, bool], dtype: torch.dtype, fast: bool) -> tuple[float, float]:
    """CPU milliseconds of forward and backward."""
    batch, heads, tokens, size, causal = shape
    joint = torch.randn(batch, tokens, 3, heads, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, key, value = joint.requires_grad_().permute(2, 0, 3, 1, 4).unbind(0)
    start = time.process_time()
    if fast:
        with fast_attention():
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    between = time.process_time()
    out.backward(torch.ones_like(out))
    return 1e3 * (between - start), 1e3 * (time.process_time() - between)


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("half.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    forms = {"float32": (torch.float32, False), "bf16": (torch.bfloat16, False), "bf16, ours": (torch.bfloat16, True)}
    print("| batch, heads, tokens, head size | float32 | bf16, torch | bf16, ours |\n|---|---|---|---|")
    rows = []
    for shape in SHAPES:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        for turn in range(options.repeats + 1):
            for name, (dtype, fast) in forms.items():
                measured = run(shape, dtype, fast)
                if turn:  # the first warms up
                    times[name].append(measured)
        medians = {
            name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in times.items()
        }
        rows.append({"shape": shape, **medians})
        cells = " | ".join(f"{forward:.1f} + {backward:.1f}" for forward, backward in medians.values())
        print(f"| {', '.join(map(str, shape[:4]))}{' causal' if shape[4] else ''} | {cells} |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
