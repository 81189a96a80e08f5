"""Two ways to read the shards of a tap: small taps are mapped into memory, large ones are read in place.

A map is quickest, but what was read through it counts as the process's memory, and where the page cache keeps large
folios, one item makes 2 MiB resident. To give that back often costs more than to read: 600 µs for 64 items of 2 KiB out
of 300 MiB, where reads take 80 µs.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from graftstack.taps.key import TapSpec
from graftstack.taps.shards import ShardFile

MAPPED_BYTES = 2**26
"""Size up to which a tap is mapped."""


class Reader(Protocol):
    """The chunks of a tap, numbered through all its shards."""

    def read(self, chunk: int, place: int, out: npt.NDArray[Any]) -> None:
        """Fills `out` [B, values of an item] with the items from `place` on. Raises `OSError`."""

    def close(self) -> None:
        """Lets go of the files."""


def open_reader(paths: Sequence[Path], spec: TapSpec) -> Reader:
    """Opens the shards at `paths` and looks at how they are built. Raises what `ShardFile` does."""
    return MappedReader(paths, spec) if spec.num_bytes <= MAPPED_BYTES else FileReader(paths, spec)


class MappedReader:
    """Shards that are mapped: the process's memory may grow by all of them."""

    def __init__(self, paths: Sequence[Path], spec: TapSpec) -> None:
        self._chunks: list[npt.NDArray[Any]] = []
        for shard, path in enumerate(paths):
            with path.open("rb") as file:
                self._chunks += ShardFile(file, spec, shard).chunks

    def read(self, chunk: int, place: int, out: npt.NDArray[Any]) -> None:
        """Copies items out of the map."""
        out[:] = self._chunks[chunk][place : place + len(out)]

    def close(self) -> None:
        """Drops the maps."""
        self._chunks = []


class FileReader:
    """Shards that are read in place: the process's memory doesn't grow, whatever their size."""

    def __init__(self, paths: Sequence[Path], spec: TapSpec) -> None:
        self._item_bytes = spec.item_bytes
        self._places: list[tuple[int, int]] = []
        with ExitStack() as files:
            for shard, path in enumerate(paths):
                file = files.enter_context(path.open("rb", buffering=0))
                self._places += [(file.fileno(), offset) for offset in ShardFile(file, spec, shard).offsets]
            self._files = files.pop_all()

    def read(self, chunk: int, place: int, out: npt.NDArray[Any]) -> None:
        """Reads items from the file."""
        descriptor, offset = self._places[chunk]
        if os.preadv(descriptor, [out.data], offset + place * self._item_bytes) != out.nbytes:
            raise OSError("a shard was cut short while it was open")

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
