"""Fashion-MNIST: 60,000 + 10,000 gray images of 28 x 28 pixels, ten kinds of clothing, from a local copy.

Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747. The copy is four IDX files, with or without .gz, as Debian's
package dataset-fashion-mnist installs them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coeft.data._settings import ImageData, choose_splits, no_groups
from coeft.errors import UserError

if TYPE_CHECKING:
    from coeft.data._source import Source

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImageData):
    """Fashion-MNIST in `root`, or where Debian installs it, or in fashion-mnist/ of the data folder ($COEFT_DATA)."""

    kind: str = "fashion_mnist"
    splits: dict[str, str | None] = field(default_factory=lambda: {"train": "train", "val": None, "test": "test"})
    root: str | None = None
    """Folder of the four IDX files; null looks where they are usually found."""
    classes: list[int] | None = None
    """Labels (0..9) to keep, renumbered 0, 1, ... in this order; null keeps all ten."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is None:
            return
        for label in self.classes:
            if not 0 <= label < len(CLASS_NAMES):
                raise UserError(f"data.classes: no class {label}; labels are 0 to {len(CLASS_NAMES) - 1}")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise UserError(f"data.classes must be two or more different labels, or null, not {list(self.classes)}")

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        import numpy as np

        from coeft.data._idx import find_root, read_pair
        from coeft.data._source import Source, Split

        no_groups(self.kind, group)
        chosen = choose_splits(self, ["train", "test"], source="Fashion-MNIST")
        root = find_root(self.root)
        kept = list(range(len(CLASS_NAMES))) if self.classes is None else list(self.classes)
        splits: dict[str, Split | None] = {}
        for part, name in chosen.items():
            if name is None:
                splits[part] = None
                continue
            images, labels = read_pair(root, name, num_classes=len(CLASS_NAMES))
            positions = np.flatnonzero(np.isin(labels, kept))
            renumbered = np.full(len(CLASS_NAMES), -1, np.int64)
            renumbered[kept] = np.arange(len(kept))
            splits[part] = Split(
                items=images[positions],
                labels=renumbered[labels[positions]],
                names=[f"{name}[{index}]" for index in positions],
            )
        train = splits["train"]
        assert train is not None
        class_names = [CLASS_NAMES[label] for label in kept]
        return Source(train=train, val=splits["val"], test=splits["test"], class_names=class_names)
