"""Draw docs/pictures/convex_hull.png and print its figures: python docs/draw_convex_hull.py

One attention layer of twelve heads, four queries, twelve keys, values in the plane. The first head's outputs should
reach points outside the convex hull of its values. A softmax map cannot get there, however it is trained; twelve
coefficients of frozen maps can.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from scipy.spatial import ConvexHull  # noqa: E402
from torch import Tensor  # noqa: E402

from coeft import coeff_attention  # noqa: E402

PICTURE = Path(__file__).parent / "pictures" / "convex_hull.png"
HEADS, QUERIES, KEYS, SIZE = 12, 4, 12, 2
STEPS = 4000


def main() -> None:
    draw = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, HEADS, n, SIZE, generator=draw) for n in (QUERIES, KEYS, KEYS))
    points = value[0, 0]
    angles = torch.tensor([0.5, 2.1, 3.6, 5.2])
    target = 1.3 * points.norm(dim=-1).max() * torch.stack([angles.cos(), angles.sin()], -1)
    alpha = torch.zeros(HEADS, HEADS, requires_grad=True)
    logits = torch.zeros(QUERIES, KEYS, requires_grad=True)

    def mixed() -> Tensor:
        return coeff_attention(3 * query, key, value, torch.eye(HEADS) + alpha)[0, 0]

    frozen = mixed().detach()
    outputs = {
        "pre-trained": frozen,
        "the maps themselves trained": fit(lambda: logits.softmax(-1) @ points, target, logits),
        f"{HEADS} coefficients trained": fit(mixed, target, alpha),
    }
    for name, found in outputs.items():
        print(f"{name}: largest distance to a target {float((found - target).norm(dim=-1).max()):.3f}")
    PICTURE.parent.mkdir(exist_ok=True)
    draw_picture(points, target, outputs)


def fit(output, target: Tensor, parameter: Tensor) -> Tensor:
    """Outputs (queries, size) after training one parameter towards the targets."""
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (output() - target).square().sum().backward()
        optimizer.step()
    return output().detach()


def draw_picture(points: Tensor, target: Tensor, outputs: dict[str, Tensor]) -> None:
    """Values, their hull, targets and outputs, one panel for each way."""
    hull = points[ConvexHull(points.numpy()).vertices]
    figure, axes = plt.subplots(1, len(outputs), figsize=(9.6, 3.5), layout="constrained", sharex=True, sharey=True)
    for axis, (name, found) in zip(axes, outputs.items(), strict=True):
        axis.fill(*hull.T, color="#4477aa", alpha=0.15, label="convex hull of the values")
        axis.plot(*points.T, ".", color="#4477aa", markersize=5, label="values of the head's keys")
        axis.plot(*target.T, "x", color="#222222", markersize=8, markeredgewidth=1.5, label="targets")
        for begin, end in zip(found, target, strict=True):
            axis.plot(*torch.stack([begin, end]).T, color="#999999", linewidth=0.8, zorder=0)
        axis.plot(*found.T, "o", color="#cc4444", markersize=6, alpha=0.85, label="outputs of the head")
        axis.set_title(name, fontsize="medium")
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
