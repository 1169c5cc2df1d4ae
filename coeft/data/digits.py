"""scikit-learn's digits: 1,797 gray images of 8 x 8 pixels, ten classes, in the package, so no download.

Source: the test set of the UCI data set "Optical recognition of handwritten digits" (E. Alpaydin, C. Kaynak, 1998).
It has no test split of its own: all images are the split `train`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coeft.data._settings import ImageData, choose_splits, no_groups

if TYPE_CHECKING:
    from coeft.data._source import Source


@dataclass(frozen=True, kw_only=True)
class Digits(ImageData):
    """The digits; pixel values 0..16 are scaled to 0..255."""

    kind: str = "digits"
    splits: dict[str, str | None] = field(default_factory=lambda: {"train": "train", "val": None, "test": None})

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        import numpy as np
        from sklearn.datasets import load_digits

        from coeft.data._source import Source, Split

        no_groups(self.kind, group)
        choose_splits(self, ["train"], source="digits")
        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        names = [f"digits[{index}]" for index in range(len(pixels))]
        train = Split(items=pixels, labels=bunch.target.astype(np.int64), names=names)
        return Source(train=train, class_names=[str(digit) for digit in range(10)])
