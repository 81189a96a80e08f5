"""What a training feeds its model: images, or the stored outputs of frozen groups. The loop doesn't know which."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.schema import Augment
from graftstack.data.images import Images
from graftstack.finetune.augment import augment
from graftstack.seeding import derive_seed
from graftstack.taps.tap import Tap

Rows = npt.NDArray[np.int64]


class Inputs(Protocol):
    """Values for rows of the data, all of them outputs of layer group ``boundary - 1``; images for boundary 0."""

    @property
    def boundary(self) -> int:
        """How many layer groups the values have been through."""

    def training(self, rows: Rows, *, epoch: int) -> Tensor:
        """Returns the values of `rows` [B] as an epoch's training sees them, as they are stored: [B, ...]."""

    def plain(self, rows: Rows) -> Tensor:
        """Returns the values of `rows` [B] without random changes, as they are stored: [B, ...]."""

    def prepared(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns stored values as the next layer group takes them, on `device`: fp32, [B, ...]."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images; each image's are a pure function of the seed, its row and the view."""

    name: Augment
    seed: int
    num_views: int | None
    """Epochs after which the changes repeat; None: never."""

    def view_of(self, epoch: int) -> int:
        """Returns which of the random changes an epoch sees."""
        return epoch if self.num_views is None else epoch % self.num_views

    def apply(self, images: Tensor, rows: Rows, *, view: int) -> Tensor:
        """Returns the images of `rows`, changed: uint8, [B, 3, S, S]."""
        seeds = [derive_seed(self.seed, "augment", view, int(row)) for row in rows]
        return augment(images, self.name, seeds)


@dataclass(frozen=True)
class ImageInputs:
    """The images themselves: uint8, [B, 3, S, S]."""

    images: Images
    preprocessing: Preprocessing
    augmentation: Augmentation | None = None
    boundary: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether training sees the images as they are."""
        return self.augmentation is None or self.augmentation.name is Augment.none

    def training(self, rows: Rows, *, epoch: int) -> Tensor:
        """Returns the images of `rows`, changed at random where that is asked for."""
        images = self.images.batch(rows)
        if self.augmentation is None or self.is_plain:
            return images
        return self.augmentation.apply(images, rows, view=self.augmentation.view_of(epoch))

    def plain(self, rows: Rows) -> Tensor:
        """Returns the images of `rows`."""
        return self.images.batch(rows)

    def prepared(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns the images as floats, normalised as the backbone expects."""
        return normalize(values, self.preprocessing, device)


@dataclass(frozen=True)
class TapItems:
    """Where the rows of a data set lie in a tap: plain images first, then each cached view of the training rows."""

    rows: Rows
    """The covered rows, ascending."""
    train: Rows
    """Those that have views, ascending."""
    num_views: int

    def __len__(self) -> int:
        return len(self.rows) + self.num_views * len(self.train)

    def plain(self, rows: Rows) -> Rows:
        """Returns the items of `rows` without random changes."""
        return np.searchsorted(self.rows, rows)

    def view(self, rows: Rows, view: int) -> Rows:
        """Returns the items of a view of the training rows `rows`."""
        return len(self.rows) + view * len(self.train) + np.searchsorted(self.train, rows)


@dataclass(frozen=True)
class TapInputs:
    """The stored outputs of layer group ``boundary - 1``."""

    tap: Tap
    items: TapItems
    boundary: int

    def training(self, rows: Rows, *, epoch: int) -> Tensor:
        """Returns the stored outputs for `rows`: the view of the epoch, where there are views."""
        views = self.items.num_views
        return self.tap.gather(self.items.view(rows, epoch % views) if views else self.items.plain(rows))

    def plain(self, rows: Rows) -> Tensor:
        """Returns the stored outputs for `rows`."""
        return self.tap.gather(self.items.plain(rows))

    def prepared(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns the values in fp32 on `device`."""
        return values.to(device, non_blocking=True).float()


def normalize(images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Returns uint8 images [B, 3, S, S] as floats, normalised as the backbone expects, on `device`."""
    scaled = images.to(device, non_blocking=True).float()
    mean = torch.tensor(preprocessing.mean, device=device).mul_(255).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).mul_(255).view(1, 3, 1, 1)
    return scaled.sub_(mean).div_(std)
