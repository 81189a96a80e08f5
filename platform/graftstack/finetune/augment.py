"""Random changes to training images, on uint8 tensors, each image with a random stream of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from graftstack.config.schema import Augment

# Up to this size images are padded and shifted, as is usual for CIFAR; larger ones are cropped and resized.
_LARGEST_SHIFTED = 64


def standard(image: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a random crop, flipped in half of the cases: [3, S, S] uint8.

    Small images are shifted by up to an eighth (He et al. 2016, section 4.2: 4 of 32 pixels); larger ones are cropped
    to between 35 % and 100 % of the area, with an aspect of 3/4 to 4/3, and resized (Szegedy et al. 2015, section 6).
    """
    size = image.shape[-1]
    cropped = _shifted(image, size, generator) if size <= _LARGEST_SHIFTED else _resized_crop(image, size, generator)
    flip = bool(torch.rand((), generator=generator) < 0.5)
    result: Tensor = F.horizontal_flip(cropped) if flip else cropped
    return result


AUGMENTATIONS: dict[Augment, Callable[[Tensor, torch.Generator], Tensor]] = {Augment.standard: standard}


def augment(images: Tensor, name: Augment, seeds: list[int]) -> Tensor:
    """Returns the images [B, 3, S, S], each changed by the random stream of its seed."""
    if name not in AUGMENTATIONS:
        return images
    change = AUGMENTATIONS[name]
    changed = [change(image, torch.Generator().manual_seed(seed)) for image, seed in zip(images, seeds, strict=True)]
    return torch.stack(changed)


def _shifted(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    margin = max(1, size // 8)
    top, left = torch.randint(0, 2 * margin + 1, (2,), generator=generator).tolist()
    shifted: Tensor = F.crop(image, top - margin, left - margin, size, size)
    return shifted


def _resized_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    area, log_aspect = torch.rand(2, generator=generator).tolist()
    side = size * (0.35 + 0.65 * area) ** 0.5
    aspect = (3 / 4) * (16 / 9) ** log_aspect
    height, width = min(size, round(side / aspect**0.5)), min(size, round(side * aspect**0.5))
    top = int(torch.randint(0, size - height + 1, (), generator=generator))
    left = int(torch.randint(0, size - width + 1, (), generator=generator))
    resized: Tensor = F.resized_crop(
        image, top, left, height, width, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    return resized
