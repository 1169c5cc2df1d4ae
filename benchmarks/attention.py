"""coeff_attention against torch's own attention: time and peak memory of forward + backward.

    python benchmarks/attention.py [--repeats 5] [--threads 2] [--shapes vit,long] [--out attention.json]
    OMP_NUM_THREADS=1 python benchmarks/attention.py --threads 1 --clock cpu       on a machine that is shared

Times are medians of interleaved runs, printed as ratios to F.scaled_dot_product_attention without any mixing in the
same run: only ratios carry over to another machine. `--clock cpu` takes the processor's time of the one thread, which
leaves out that others had the processor, though not that they had its caches. Peak memory is the growth of the
process's resident set over the inputs in a process of its own, sampled every millisecond; shapes beyond 2,048 tokens
are timed there too, once. The second table is growth with the number of tokens, of the shapes in `growth`. CPU only.
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
    "growth": [(1, 12, 12, tokens, 64, False) for tokens in (256, 512, 1024, 2048, 4096)],
}
REFERENCE_UP_TO = 2048
"""Tokens; beyond, the reference's maps do not fit in memory beside each other."""


def steps(shape: tuple, dtype: torch.dtype, dropout: float = 0.0) -> dict[str, Callable[[], object]]:
    """One forward + backward of each form, with inputs laid out as a model's joint projection."""
    B, H, KV, N, E, causal = shape
    joint = torch.randn(B, N, H + 2 * KV, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in joint.split((H, KV, KV), 2))
    coeff = (torch.eye(H) + 0.05 * torch.randn(H, H)).requires_grad_()
    grad = torch.randn(B, H, N, E).to(dtype)
    options = {"is_causal": causal, "enable_gqa": KV != H, "dropout_p": dropout}

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


def seconds(forms: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            start = clock()
            form()
            if turn:  # the first warms up
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def alone_here(form: Callable[[], object], clock: Callable[[], float]) -> tuple[int, float]:
    """Bytes by which one run grows the process, and its seconds."""
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = clock()
    form()
    took = clock() - start
    done.set()
    watcher.join()
    return peak - before, took


def alone(shape: tuple, dtype: str, form: str, given: argparse.Namespace) -> tuple[float, float]:
    """MiB and seconds of one run in a fresh process."""
    line = [sys.executable, __file__, "--alone", json.dumps([shape, dtype, form])]
    line += ["--threads", str(given.threads), "--clock", given.clock, "--dropout", str(given.dropout)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    grown, took = done.stdout.split()
    return int(grown) / 2**20, float(took)


def measure(shape: tuple, dtype: str, given: argparse.Namespace) -> dict:
    """One row: seconds and MiB by form."""
    tokens = shape[3]
    names = ["sdpa", "blockwise", "reference"] if tokens <= REFERENCE_UP_TO else ["sdpa", "blockwise"]
    memory, times = {}, {}
    if given.memory or tokens > REFERENCE_UP_TO:
        for name in names:
            memory[name], times[name] = alone(shape, dtype, name, given)
    if tokens <= REFERENCE_UP_TO:
        times = seconds(steps(shape, getattr(torch, dtype), given.dropout), given.repeats, CLOCKS[given.clock])
    return {"shape": shape, "dtype": dtype, "seconds": times, "peak_mib": memory}


def table(rows: list[dict]) -> str:
    lines = [
        "| batch, heads, key heads, tokens, head size | type | sdpa ms | blockwise / sdpa | reference / sdpa "
        "| blockwise / reference | auto | peak MiB: sdpa, blockwise, reference | blockwise / sdpa |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        B, H, KV, N, E, causal = row["shape"]
        times, memory = row["seconds"], row["peak_mib"]
        base, ours, reference = times["sdpa"], times["blockwise"], times.get("reference")
        cells = [
            f"{B}, {H}, {KV}, {N}, {E}{' causal' if causal else ''}",
            row["dtype"],
            f"{1e3 * base:.1f}",
            f"{ours / base:.2f}",
            f"{reference / base:.2f}" if reference else "",
            f"{ours / reference:.2f}" if reference else "",
            "blockwise" if prefers_blocks(B, H, N, N) else "reference",
            ", ".join(f"{value:.0f}" for value in memory.values()),
            f"{memory['blockwise'] / memory['sdpa']:.2f}" if memory else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(rows: list[dict]) -> str:
    """Nanoseconds for each entry of the maps: constant where time grows as the square of the tokens; MiB by tokens."""
    lines = ["| tokens | type | ns an entry: sdpa, blockwise, reference | peak KiB a token |", "|---|---|---|---|"]
    for row in rows:
        B, H, _, N, _, _ = row["shape"]
        times = ", ".join(f"{1e9 * value / (B * H * N * N):.1f}" for value in row["seconds"].values())
        memory = ", ".join(f"{1024 * value / N:.0f}" for value in row["peak_mib"].values())
        lines.append(f"| {N} | {row['dtype']} | {times} | {memory} |")
    return "\n".join(lines)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu only with one thread")
    parser.add_argument("--shapes", default="small,vit,long,causal", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability of dropping an entry of a map")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.clock == "cpu" and given.threads != 1:
        parser.error("--clock cpu counts one thread: add --threads 1")
    torch.set_num_threads(given.threads)
    if given.alone:
        shape, dtype, form = json.loads(given.alone)
        B, H, KV, _, E, causal = shape
        steps((1, H, KV, 8, E, causal), getattr(torch, dtype))[form]()  # what only the first call of a form allocates
        print(*alone_here(steps(tuple(shape), getattr(torch, dtype), given.dropout)[form], CLOCKS[given.clock]))
        return
    rows: dict[str, list[dict]] = {"shapes": [], "growth": []}
    for dtype in given.dtypes.split(","):
        for name in given.shapes.split(","):
            for shape in SHAPES[name]:
                rows["growth" if name == "growth" else "shapes"].append(measure(shape, dtype, given))
                print(f"measured {shape} {dtype}", file=sys.stderr, flush=True)
    print(*(form(found) for form, found in ((table, rows["shapes"]), (growth, rows["growth"])) if found), sep="\n\n")
    if given.out:
        head = {"torch": torch.__version__, "threads": given.threads, "clock": given.clock}
        given.out.write_text(json.dumps(head | rows, indent=1))


if __name__ == "__main__":
    main()
