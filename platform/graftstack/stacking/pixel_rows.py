"""Images as rows of numbers, for estimators that know nothing of images."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graftstack.stacking.work import RowSource

if TYPE_CHECKING:
    from graftstack.stacking.image_rows import ImageRows

_CHUNK_BYTES = 2**26
"""Pixels that are looked at at once."""


class PixelRows(RowSource):
    """N images as ``float32 [N, C * S * S]`` in 0..1, which are made where they are needed. Pickles without the pixels.

    C is 1 where all images are grey, else 3.
    """

    def __init__(self, images: "ImageRows", num_channels: int | None = None) -> None:
        """Reads nothing.

        Args:
            images: the images.
            num_channels: 1 or 3; a model wants what it has learnt from. Colours become grey by their mean. None: as
                the images have, which are looked at once somebody wants to know.
        """
        self.images = images
        self._num_channels = num_channels

    @property
    def num_channels(self) -> int:
        """1 or 3."""
        if self._num_channels is None:
            self._num_channels = 1 if _all_grey(self.images) else 3
        return self._num_channels

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int]:
        """N and C * S * S."""
        return len(self), self.num_channels * self.images.image_size**2

    @property
    def fingerprint(self) -> str:
        """Of the images, and how they are laid out."""
        return f"{self.images.fingerprint}/{self.num_channels}"

    def take(self, rows: Any) -> npt.NDArray[np.float32]:
        """Returns the rows at positions (or where a mask says so) `rows`, ``float32 [B, C * S * S]``."""
        return np.asarray(PixelRows(self.images.take(rows), self.num_channels))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:  # noqa: FBT001
        if copy is False:
            raise ValueError("rows of pixels are made anew each time; a copy can't be avoided")
        values = np.empty(self.shape, dtype=np.float32)
        for rows in _chunks(self.images):
            pixels = self.images.pixels(rows).numpy().astype(np.float32) / np.float32(255)
            if self.num_channels == 1:
                pixels = pixels.mean(axis=1, dtype=np.float32)
            values[rows] = pixels.reshape(len(rows), -1)
        return values if dtype is None else values.astype(dtype)


def _all_grey(images: "ImageRows") -> bool:
    for rows in _chunks(images):
        pixels = images.pixels(rows)
        if not (pixels == pixels[:, :1]).all():
            return False
    return True


def _chunks(images: "ImageRows") -> list[npt.NDArray[np.int64]]:
    size = max(1, _CHUNK_BYTES // (12 * images.image_size**2))
    return [np.arange(start, min(start + size, len(images))) for start in range(0, len(images), size)]
