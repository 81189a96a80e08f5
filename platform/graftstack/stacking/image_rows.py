"""Images as base models see them: some rows of the data, without their labels."""

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graftstack.data.load import ImageData
from graftstack.stacking.work import RowSource

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]


class ImageRows(RowSource):
    """N images: the `rows` of `data`, in that order. Pickles without the pixels.

    The whole data stays known, so that what is stored of it, a tap, serves any of its rows. Its labels aren't to be
    used: a base model learns from the ones that it is given.
    """

    def __init__(self, data: ImageData, rows: npt.ArrayLike | None = None) -> None:
        """Copies nothing.

        Args:
            data: the images, in one size.
            rows: positions in them, ``int64 [N]``; None: all.
        """
        self.data = data
        self.rows: Rows = np.arange(len(data)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(data):
            raise IndexError(f"rows {self.rows.min()}..{self.rows.max()}: the data has 0..{len(data) - 1}")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        size = self.image_size
        return f"<{len(self)} images of {size}x{size} pixels>"

    @property
    def image_size(self) -> int:
        """Height and width S, in pixels."""
        return self.data.images.image_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, 3, S, S."""
        return len(self), 3, self.image_size, self.image_size

    @property
    def fingerprint(self) -> str:
        """Of the images' content, their size, and which rows in which order."""
        digest = blake2b(f"{self.data.fingerprint} {len(self.data)} {self.image_size}\0".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.rows).tobytes())
        return digest.hexdigest()

    def take(self, rows: Any) -> "ImageRows":
        """Returns the images at positions (or where a mask says so) `rows` of these, not of the whole data."""
        return ImageRows(self.data, self.rows[np.asarray(rows)])

    def pixels(self, rows: Rows | None = None) -> "torch.Tensor":
        """Returns the images at positions `rows` of these, or all: ``uint8 [B, 3, S, S]``."""
        return self.data.images.batch(self.rows if rows is None else self.rows[rows])
