"""Reading a tap: any items, in any order."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from graftstack.errors import GraftstackError
from graftstack.reason import reason
from graftstack.taps.key import CHUNK_ITEMS, TapSpec
from graftstack.taps.locks import FileLock
from graftstack.taps.readers import Reader, open_reader
from graftstack.taps.shards import numpy_dtype, shard_name, torch_dtype

if TYPE_CHECKING:
    import torch

_REMEDY = "run again with resume=true, which makes it again"


class TapMissingError(GraftstackError):
    """A tap isn't there, or a part of it isn't."""


class Tap:
    """The outputs of a layer group for all items, ``len(tap)`` of them, each of shape `shape`.

    While it is open it isn't evicted. It pickles as its place and its spec, and opens again where it is unpickled.
    A process's memory doesn't grow with it, beyond 64 MiB.
    """

    def __init__(self, folder: Path, spec: TapSpec, *, lock: FileLock, reopen: "Callable[[TapSpec], Tap]") -> None:
        """Opens all files; looks at how they are built, not at their values.

        Args:
            folder: holds the shards.
            spec: the tap.
            lock: keeps it from eviction; the tap lets go of it.
            reopen: opens it in another process; pickled with it.

        Raises:
            TapMissingError: a shard isn't there, or isn't what it should be.
        """
        self.spec = spec
        self._lock, self._reopen = lock, reopen
        self._reader: Reader | None = _opened([folder / shard_name(shard) for shard in range(spec.num_shards)], spec)
        self._dtypes = numpy_dtype(spec), torch_dtype(spec)

    def __len__(self) -> int:
        return self.spec.num_items

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an item."""
        return self.spec.shape

    @property
    def num_bytes(self) -> int:
        """The size of all values."""
        return self.spec.num_bytes

    def __getitem__(self, item: int) -> "torch.Tensor":
        return self.gather(np.array([item]))[0]

    def gather(self, items: npt.NDArray[np.int64]) -> "torch.Tensor":
        """Returns a copy of some items, ``[len(items), *shape]``, in the type in which they are stored.

        Raises:
            IndexError: an item isn't one of 0..len-1.
            TapMissingError: the tap is closed.
        """
        import torch

        if self._reader is None:
            raise TapMissingError(f"tap {self.spec.key.digest}: closed; open it again")
        if len(items) and not 0 <= items.min() <= items.max() < len(self):
            raise IndexError(f"items {items.min()}..{items.max()}: the tap holds 0..{len(self) - 1}")
        stored_as, seen_as = self._dtypes
        values = np.empty((len(items), self.spec.num_values), stored_as)
        starts = _starts_of_runs(items)
        stops = [*starts.tolist(), len(items)][1:]
        chunks, places = (part.tolist() for part in np.divmod(items[starts], CHUNK_ITEMS))
        for start, stop, chunk, place in zip(starts.tolist(), stops, chunks, places, strict=True):
            self._reader.read(chunk, place, values[start:stop])
        return torch.from_numpy(values).view(seen_as).reshape(len(items), *self.shape)

    def close(self) -> None:
        """Lets go of the files; a second time does nothing."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._lock.close()

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[TapSpec], "Tap"], tuple[TapSpec]]:
        return self._reopen, (self.spec,)


def _starts_of_runs(items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns where in `items` those begin that follow each other within a chunk: each run can be read at once."""
    is_start = np.ones(len(items), bool)
    is_start[1:] = (items[1:] - items[:-1] != 1) | (items[1:] % CHUNK_ITEMS == 0)
    return np.flatnonzero(is_start)


def _opened(paths: list[Path], spec: TapSpec) -> Reader:
    try:
        return open_reader(paths, spec)
    except FileNotFoundError as error:
        raise TapMissingError(f"{error.filename}: isn't there; {_REMEDY}") from error
    except (ValueError, OSError, pa.ArrowException) as error:
        raise TapMissingError(f"{paths[0].parent}: can't be read ({reason(error)}); {_REMEDY}") from error
