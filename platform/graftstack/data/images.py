"""Images by row: memory-mapped from a cache, or decoded for each batch, which pickle to a few bytes; or in memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from graftstack.config.schema import DataConfig
from graftstack.data.encoded import EncodedImages
from graftstack.data.location import locate
from graftstack.data.table import read_table
from graftstack.errors import DataError
from graftstack.machine import usable_cpus

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 2**26
"""Of pixels that are copied into memory at once."""


class Images(Protocol):
    """N images of S x S pixels."""

    @property
    def image_size(self) -> int:
        """Height and width S, in pixels."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> "torch.Tensor":
        """Returns the images at `indices` ``[B]``, in that order: a fresh contiguous ``uint8 [B, 3, S, S]``."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in an array, which may be read-only.

    Pickling leaves the array out of band (protocol 5), so that processes which share memory need no copies of it.
    """

    pixels: npt.NDArray[np.uint8]
    """``[N, S, S, 3]``."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        """Height and width S, in pixels."""
        return int(self.pixels.shape[1])

    def batch(self, indices: npt.NDArray[np.int64]) -> "torch.Tensor":
        """Returns the images at `indices` ``[B]``: a fresh contiguous ``uint8 [B, 3, S, S]``."""
        return _to_tensor(self.pixels[indices])


class CachedImages:
    """Images in a memory-mapped ``.npy`` file, ``uint8 [N + bad, S, S, 3]``, that processes of a machine share."""

    def __init__(self, path: Path, bad: Sequence[int]) -> None:
        self._path, self._bad = path, tuple(bad)
        try:
            # A plain array over the map: np.memmap would pay for its own bookkeeping at every batch.
            self._array = np.asarray(np.load(path, mmap_mode="r"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: the decoded images aren't on this machine; set data.cache_dir to a folder that all share"
            ) from error
        self._rows = np.delete(np.arange(len(self._array)), self._bad) if bad else None

    def __len__(self) -> int:
        return len(self._array) - len(self._bad)

    @property
    def image_size(self) -> int:
        """Height and width S, in pixels."""
        return int(self._array.shape[1])

    @property
    def whole(self) -> ArrayImages | None:
        """The same images as an array over the map; None where the file holds bad rows too."""
        return None if self._bad else ArrayImages(self._array)

    def batch(self, indices: npt.NDArray[np.int64]) -> "torch.Tensor":
        """Returns the images at `indices` ``[B]``: a fresh contiguous ``uint8 [B, 3, S, S]``."""
        return _to_tensor(self._array[indices if self._rows is None else self._rows[indices]])

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedImages, (self._path, self._bad)


class DecodeOnDemand:
    """Images that are decoded for each batch, by a pool of threads.

    A bad image that isn't among `bad` raises `DataError` in the batch that touches it. Unpickling reads the source
    again, so what travels to a worker is the configuration, not the images.
    """

    def __init__(self, encoded: EncodedImages, config: DataConfig, image_size: int, bad: Sequence[int]) -> None:
        self._encoded, self._config, self._image_size, self._bad = encoded, config, image_size, tuple(bad)
        self._rows = np.delete(np.arange(len(encoded)), self._bad)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_size(self) -> int:
        """Height and width S, in pixels."""
        return self._image_size

    def batch(self, indices: npt.NDArray[np.int64]) -> "torch.Tensor":
        """Returns the images at `indices` ``[B]``: a fresh contiguous ``uint8 [B, 3, S, S]``."""
        pieces = [piece.tolist() for piece in np.array_split(self._rows[indices], usable_cpus())]
        # A pool a batch costs microseconds, and unlike one that stays, it survives a fork.
        with ThreadPoolExecutor(usable_cpus()) as pool:
            decoded = list(pool.map(lambda rows: self._encoded.decode_rows(rows, self._image_size), pieces))
        bad = {row: reason for part in decoded for row, reason in part.bad.items()}
        if bad:
            raise self._encoded.error(bad)
        return _to_tensor(np.concatenate([part.images for part in decoded]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _decode_again, (self._config, self._image_size, self._bad)


def in_memory(images: Images) -> ArrayImages:
    """Returns `images` as one array: of those that a file holds whole, the file's memory map; of others, a copy.

    Raises:
        DataError: an image can't be decoded.
    """
    if isinstance(images, ArrayImages):
        return images
    if isinstance(images, CachedImages) and images.whole is not None:
        return images.whole
    size = images.image_size
    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    num_rows = max(1, _COPY_BYTES // (3 * size**2))
    for start in range(0, len(images), num_rows):
        rows = np.arange(start, min(start + num_rows, len(images)))
        pixels[rows] = images.batch(rows).permute(0, 2, 3, 1).numpy()
    return ArrayImages(pixels)


def encoded_images(config: DataConfig, table: Any) -> EncodedImages:
    """Returns the images of `table`, which `read_table` made from `config`."""
    return EncodedImages(table, None if config.path is None else locate(config.path))


def _decode_again(config: DataConfig, image_size: int, bad: Sequence[int]) -> DecodeOnDemand:
    # Which rows there are depends on the configuration alone, not on whether their labels are needed.
    table = read_table(config, require_labels=False).table
    return DecodeOnDemand(encoded_images(config, table), config, image_size, bad)


def _to_tensor(pixels: npt.NDArray[np.uint8]) -> "torch.Tensor":
    import torch

    # NumPy turns the axes faster than torch does, and without waking torch's threads.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
