"""What the operations of one block of coeff_attention take alone: the floor of any order of them.

    OMP_NUM_THREADS=1 python benchmarks/operations.py [--tokens 197] [--heads 12] [--repeats 40]

Forward and backward of one item in float32, one operation after the other on the same memory, without what the blocks
do between them; nanoseconds of one thread for each entry of the maps, medians. torch's whole attention without mixing,
of 16 items, stands below.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64
softmax_backward = torch.ops.aten._softmax_backward_data.out


def operations(H: int, N: int) -> dict[str, Callable[[], object]]:
    """Name -> the operation, in the order of coeft/attention/blockwise.py."""
    query, key, value, grad, out = (torch.randn(H, N, SIZE) for _ in range(5))
    key_columns, value_columns = (t.transpose(1, 2).contiguous() for t in (key, value))
    maps, mixed, slope = (torch.rand(H, N, N) for _ in range(3))
    coeff = torch.eye(H)

    def mix(source: Tensor, target: Tensor) -> Tensor:
        return torch.mm(coeff, source.view(H, -1), out=target.view(H, -1))

    return {
        "scores": lambda: torch.bmm(query, key_columns, out=maps),
        "softmax": lambda: torch.softmax(maps, -1, out=maps),
        "mixing": lambda: mix(maps, mixed),
        "output": lambda: torch.bmm(mixed, value, out=out),
        "scores again": lambda: torch.bmm(query, key_columns, out=maps),
        "softmax again": lambda: torch.softmax(maps, -1, out=maps),
        "mixing again": lambda: mix(maps, mixed),
        "gradient of the values": lambda: torch.bmm(mixed.transpose(1, 2), grad, out=out),
        "gradient of the mixed maps": lambda: torch.bmm(grad, value_columns, out=mixed),
        "gradient of the coefficients": lambda: torch.bmm(mixed.transpose(0, 1), maps.permute(1, 2, 0)).sum(0),
        "gradient of the maps": lambda: mix(mixed, slope),
        "backward of the softmax": lambda: softmax_backward(slope, maps, -1, slope.dtype, grad_input=slope),
        "gradient of the queries": lambda: torch.bmm(slope, key, out=out),
        "gradient of the keys": lambda: torch.bmm(slope.transpose(1, 2), query, out=out),
    }


def whole(H: int, N: int) -> Callable[[], object]:
    """torch's attention, forward + backward."""
    inputs = [torch.randn(16, N, H, SIZE).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad = torch.randn(16, H, N, SIZE)
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    entries = given.heads * given.tokens**2
    alone, attention = operations(given.heads, given.tokens), whole(given.heads, given.tokens)
    times: dict[str, list[float]] = {name: [] for name in [*alone, "torch"]}
    for turn in range(given.repeats + 1):
        for name, form, share in [*((name, form, 1) for name, form in alone.items()), ("torch", attention, 16)]:
            start = time.thread_time()
            form()
            if turn:  # the first warms up
                times[name].append((time.thread_time() - start) / share / entries * 1e9)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in alone:
        print(f"{name:32}{medians[name]:6.2f}")
    total = sum(medians[name] for name in alone)
    print(f"{'all':32}{total:6.2f}\n{'torch, without mixing':32}{medians['torch']:6.2f}")


if __name__ == "__main__":
    main()
