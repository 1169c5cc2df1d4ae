"""coeff_attention against torch's own attention: time and peak memory of forward + backward.

    python benchmarks/attention.py [--repeats 5] [--threads 2] [--shapes vit,long] [--out attention.json]

Times are medians of interleaved runs, printed as ratios to F.scaled_dot_product_attention without any mixing in the
same run: only ratios carry over to another machine. Peak memory is the growth of the process's resident set over the
inputs in a process of its own, sampled every millisecond. CPU only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from coeft.attention.functional import coeff_attention, prefers_blocks

# name -> (batch, heads, key heads, tokens, head size, causal)
SHAPES = {
    "small": [(64, 6, 6, 17, 16, False), (16, 12, 12, 65, 64, False)],
    "vit": [(16, 12, 12, 197, 64, False), (4, 12, 12, 577, 64, False)],
    "long": [(1, 9, 9, 1024, 64, False), (1, 12, 12, 2048, 64, False)],
    "causal": [(4, 9, 3, 512, 64, True), (1, 9, 3, 2048, 64, True)],
    "8192": [(1, 12, 12, 8192, 64, False)],
}
REFERENCE_UP_TO = 2048
"""Tokens; beyond, the reference's maps do not fit in memory beside each other."""


def steps(shape: tuple, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One forward + backward of each form, with inputs laid out as a model's joint projection."""
    B, H, KV, N, E, causal = shape
    joint = torch.randn(B, N, H + 2 * KV, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in joint.split((H, KV, KV), 2))
    coeff = (torch.eye(H) + 0.05 * torch.randn(H, H)).requires_grad_()
    grad = torch.randn(B, H, N, E).to(dtype)
    options = {"is_causal": causal, "enable_gqa": KV != H}

    def step(call: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), inputs, grad)

    forms = {
        "sdpa": step(lambda: F.scaled_dot_product_attention(q, k, v, **options), q, k, v),
        "blockwise": step(
            lambda: coeff_attention(q, k, v, coeff, implementation="blockwise", **options), q, k, v, coeff
        ),
    }
    if N <= REFERENCE_UP_TO:
        forms["reference"] = step(
            lambda: coeff_attention(q, k, v, coeff, implementation="reference", **options), q, k, v, coeff
        )
    return forms


def seconds(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_here(form: Callable[[], object]) -> int:
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    form()
    done.set()
    watcher.join()
    return peak - before


def peak(shape: tuple, dtype: str, form: str, threads: int) -> float:
    """MiB, in a fresh process."""
    line = [sys.executable, __file__, "--peak", json.dumps([shape, dtype, form]), "--threads", str(threads)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default="small,vit,long,causal", help="of small, vit, long, causal, 8192")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        shape, dtype, form = json.loads(given.peak)
        B, H, KV, _, E, causal = shape
        steps((1, H, KV, 8, E, causal), getattr(torch, dtype))[form]()  # what only the first call of a form allocates
        print(peak_here(steps(tuple(shape), getattr(torch, dtype))[form]))
        return
    rows = []
    print(
        "| batch, heads, key heads, tokens, head size | type | sdpa ms | blockwise / sdpa | reference / sdpa |", end=""
    )
    print(" blockwise / reference | auto | peak MiB: sdpa, blockwise, reference |\n|---|---|---|---|---|---|---|---|")
    for dtype in given.dtypes.split(","):
        for shape in (shape for name in given.shapes.split(",") for shape in SHAPES[name]):
            B, H, KV, N, E, causal = shape
            forms = steps(shape, getattr(torch, dtype))
            time_of = seconds(forms, given.repeats)
            memory = {form: peak(shape, dtype, form, given.threads) for form in forms} if given.memory else {}
            rows.append({"shape": shape, "dtype": dtype, "seconds": time_of, "peak_mib": memory})
            base = time_of["sdpa"]
            reference = time_of.get("reference")
            cells = [
                f"{B}, {H}, {KV}, {N}, {E}{' causal' if causal else ''}",
                dtype,
                f"{1e3 * base:.1f}",
                f"{time_of['blockwise'] / base:.2f}",
                f"{reference / base:.2f}" if reference else "",
                f"{time_of['blockwise'] / reference:.2f}" if reference else "",
                "blockwise" if prefers_blocks(B, H, N, N) else "reference",
                ", ".join(f"{memory[form]:.0f}" for form in ("sdpa", "blockwise", "reference") if form in memory),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
    if given.out:
        given.out.write_text(json.dumps({"torch": torch.__version__, "threads": given.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
