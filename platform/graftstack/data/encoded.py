"""The encoded images of a table, decoded by a pool of threads: Pillow lets go of the GIL while it decodes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from graftstack.data.decode import BadImageError, decode, shorter_side
from graftstack.data.location import Location
from graftstack.errors import DataError
from graftstack.machine import usable_cpus
from graftstack.reason import reason

_CHUNK_ROWS, _CHUNK_BYTES = 64, 2**26
"""Rows that a thread decodes at once: so many, or fewer where their pixels would take more memory than this."""


class Decoded(NamedTuple):
    """Decoded rows; the pixels of bad ones are 0."""

    images: npt.NDArray[np.uint8]
    """``[B, S, S, 3]``."""
    bad: dict[int, str]
    """Row -> why it can't be decoded."""


class EncodedImages:
    """The images of a table's rows; the bytes lie in the table, or in files below `location`."""

    def __init__(self, table: pa.Table, location: Location | None) -> None:
        columns = table.column_names
        if "image" not in columns and "path" not in columns:
            raise DataError("data.image is missing: the table has no column of images; add data.image=COLUMN")
        self._row_ids = table["row_id"]
        self._bytes = table["image"] if "image" in columns else None
        self._paths = table["path"] if "path" in columns else None
        self._location = location

    def __len__(self) -> int:
        return len(self._row_ids)

    def decode_rows(self, rows: Sequence[int], image_size: int) -> Decoded:
        """Returns the images of `rows`."""
        images = np.zeros((len(rows), image_size, image_size, 3), dtype=np.uint8)
        bad = {}
        for position, row in enumerate(rows):
            try:
                images[position] = decode(self._read(row), image_size)
            except BadImageError as error:
                bad[row] = str(error)
        return Decoded(images, bad)

    def decode_all(self, image_size: int) -> Iterator[Decoded]:
        """Yields all rows in order, a chunk at a time; few chunks are in memory at once."""
        num_threads = usable_cpus()
        num_rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (3 * image_size**2)))
        pending: deque[Future[Decoded]] = deque()
        with ThreadPoolExecutor(num_threads) as pool:
            for start in range(0, len(self), num_rows):
                rows = range(start, min(start + num_rows, len(self)))
                pending.append(pool.submit(self.decode_rows, rows, image_size))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def shorter_side(self, row: int) -> int | None:
        """Returns the shorter of the image's height and width, in pixels; None where it can't be decoded."""
        try:
            return shorter_side(self._read(row))
        except BadImageError:
            return None

    def error(self, bad: dict[int, str]) -> DataError:
        """Returns the error that names the first of the `bad` rows."""
        row = min(bad)
        path = self._paths[row].as_py() if self._paths is not None else None
        row_id = self._row_ids[row].as_py()
        name = f"{row_id} ({path})" if path and path != row_id else row_id
        return DataError(
            f"image {name} can't be decoded: {bad[row]}; fix the file, or set data.on_bad_image=skip to leave it out"
        )

    def _read(self, row: int) -> bytes:
        data = self._bytes[row].as_py() if self._bytes is not None else None
        if data is not None:
            return bytes(data)
        path = self._paths[row].as_py() if self._paths is not None else None
        if not path or self._location is None:
            raise BadImageError("the row has neither bytes nor a path")
        try:
            return self._location.read(path)
        except FileNotFoundError as error:
            raise BadImageError("no such file") from error
        except Exception as error:  # each file system has exceptions of its own
            raise BadImageError(f"can't be read: {reason(error)}") from error
