"""Decoded images, kept in a file: each image is decoded once on a machine, whatever trains on it.

A cache is two files: ``KEY.npy``, ``uint8 [N, S, S, 3]`` with the bad rows 0, and ``KEY.json``, which says which rows
those are and holds a checksum. The key is what the pixels depend on: fingerprint, image size, decoder.

Both are written under another name and renamed when whole, and a lock lets one process write while others wait, so
none ever sees half a cache. A cache that doesn't match its checksum is made again.
"""

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import PIL

from graftstack.data.decode import DECODER_VERSION
from graftstack.data.encoded import Decoded
from graftstack.machine import cache_root

_WHOLE_BYTES = 2**28
"""Files up to this size are checked whole; of larger ones, blocks spread over the file."""
_BLOCK_BYTES, _NUM_BLOCKS = 2**20, 64
_SPARE_BYTES = 2**26
"""What a cache leaves free on the disk."""


@dataclass(frozen=True)
class Cache:
    """The files of one cache, which may or may not exist."""

    folder: Path
    key: str
    num_rows: int
    image_size: int

    @property
    def pixels(self) -> Path:
        """Where the images lie."""
        return self.folder / f"{self.key}.npy"

    @property
    def num_bytes(self) -> int:
        """The size of the images."""
        return self.num_rows * self.image_size**2 * 3

    def open(
        self, decode: Callable[[], Iterable[Decoded]], progress: Callable[[int, int], None] | None
    ) -> dict[int, str]:
        """Makes the images unless they are there; returns row -> reason of those that can't be decoded.

        Args:
            decode: called if the images must be made; gives all rows in order.
            progress: called with (rows decoded, rows in all) while they are made.

        Raises:
            OSError: the folder can't be written, or the disk is full.
        """
        bad = self._bad_rows()
        if bad is not None:
            return bad
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            bad = self._bad_rows()  # another process may have made them meanwhile
            return self._make(decode(), progress) if bad is None else bad

    def _bad_rows(self) -> dict[int, str] | None:
        """Returns row -> reason; None if there is no cache, or it is damaged."""
        try:
            about = json.loads(self._about.read_text())
            whole = about["checksum"] == _checksum(self.pixels)
            return {int(row): reason for row, reason in about["bad"].items()} if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Waits until no other process of this machine makes the cache."""
        with (self.folder / f"{self.key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file closes, also if the process dies
            yield

    def _make(self, chunks: Iterable[Decoded], progress: Callable[[int, int], None] | None) -> dict[int, str]:
        if shutil.disk_usage(self.folder).free < self.num_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{self.num_bytes:,} bytes don't fit on the disk", str(self.folder))
        bad: dict[int, str] = {}
        with _replacing(self.pixels) as file:
            # Written in order, not through a memory map: a full disk is then an error, where a map would be killed.
            np.lib.format.write_array_header_1_0(file, self._header())
            done = 0
            for chunk in chunks:
                file.write(chunk.images.data)
                bad |= chunk.bad
                done += len(chunk.images)
                if progress is not None:
                    progress(done, self.num_rows)
        with _replacing(self._about) as file:
            file.write(json.dumps({"checksum": _checksum(self.pixels), "bad": bad}).encode())
        return bad

    @property
    def _about(self) -> Path:
        return self.folder / f"{self.key}.json"

    def _header(self) -> dict[str, object]:
        shape = (self.num_rows, self.image_size, self.image_size, 3)
        return {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}


def cache_for(cache_dir: str | None, fingerprint: str, *, num_rows: int, image_size: int) -> Cache:
    """Returns the cache of images, below `cache_dir`, else $GRAFTSTACK_CACHE, else ~/.cache/graftstack."""
    key = f"{fingerprint}-{image_size}px-v{DECODER_VERSION}-pillow{PIL.__version__}"
    return Cache(cache_root(cache_dir) / "images", key, num_rows, image_size)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` once it is written, whole and safe on the disk."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    """Returns the size and a CRC of a file: it is there to find damage, which is quick, not malice."""
    size = path.stat().st_size
    crc = 0
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
        else:
            for start in np.linspace(0, size - _BLOCK_BYTES, _NUM_BLOCKS, dtype=np.int64).tolist():
                file.seek(start)
                crc = zlib.crc32(file.read(_BLOCK_BYTES), crc)
    return f"{size}:{crc:08x}"
