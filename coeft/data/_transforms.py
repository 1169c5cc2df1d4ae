"""Augmentation and normalisation of a batch of uint8 images, on whatever device it is."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from coeft.backbones._backbone import Preprocessing


class Transform(nn.Module):
    """A change of one entry of a batch."""

    takes: ClassVar[str] = "pixel_values"
    """Key of the entry."""
    gives: ClassVar[str] = "pixel_values"
    """Key of what is made of it."""


class Normalize(Transform):
    """(pixels / 255 - mean) / std per channel: uint8 (B, C, H, W) -> float32 of the same shape."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Facts of the configuration, so no part of any checkpoint.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


class Augment(Transform):
    """Random changes of training images, drawn for each image from torch's global generator on the CPU.

    random_resized_crop cuts from the image in its evaluation size, since that is what the cache holds: what
    evaluation crops away is never seen. The identity for no names, and in eval mode.
    """

    def __init__(self, names: Sequence[str], preprocessing: Preprocessing) -> None:
        super().__init__()
        interpolation = InterpolationMode(preprocessing.interpolation)
        makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "flip": lambda: v2.RandomHorizontalFlip(),
            "random_resized_crop": lambda: v2.RandomResizedCrop(
                preprocessing.image_size, interpolation=interpolation, antialias=True
            ),
            # Its defaults, two operations of magnitude 9 of 31, with gray where an operation leaves the image.
            "randaugment": lambda: v2.RandAugment(
                interpolation=InterpolationMode.BILINEAR, fill=[round(255 * mean) for mean in preprocessing.mean]
            ),
        }
        self.names = list(names)
        self._steps = [makers[name]() for name in self.names]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> the same."""
        if not self.training or not self._steps:
            return images
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Tensor) -> Tensor:
        for step in self._steps:
            image = step(image)
        return image
