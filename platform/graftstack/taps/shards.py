"""The files of a tap: Arrow IPC files that say themselves whether they are whole.

A file is one shard, a record batch of it one chunk of 256 items, in one column ``value`` of fixed-size lists; bfloat16,
which Arrow lacks, is stored as its 16 bits. The schema's metadata names the tap and the shard, a batch's the CRC-32 of
its values, which begins at the chunk's number: a chunk in another's place is damage too.
"""

import mmap
import os
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from graftstack.errors import ConfigError
from graftstack.reason import reason
from graftstack.taps.key import TapSpec

if TYPE_CHECKING:
    import torch

_VALUE_TYPES: dict[str, tuple[npt.DTypeLike, pa.DataType]] = {
    "fp32": (np.float32, pa.float32()),
    "fp16": (np.float16, pa.float16()),
    "bf16": (np.uint16, pa.uint16()),
}
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_verified: set[tuple[str, int, int, int, int, int]] = set()
"""The shards that this process found whole, with the identity of their files."""


def shard_name(shard: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{shard:03d}.arrow"


def numpy_dtype(spec: TapSpec) -> np.dtype[Any]:
    """Returns the type in which numpy sees the stored values."""
    return np.dtype(_VALUE_TYPES[spec.key.dtype][0])


def torch_dtype(spec: TapSpec) -> "torch.dtype":
    """Returns the type of the stored values."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[spec.key.dtype])
    return dtype


class ShardWriter:
    """Writes the file of a shard chunk by chunk: no more than one is held in memory.

    Args:
        file: new and empty.
        spec: the tap.
        shard: which of its shards.

    Raises:
        OSError: the file can't be written.
        ConfigError: a value is too large for the type in which it would be stored.
        ValueError: the chunks aren't those of the shard.
    """

    def __init__(self, file: IO[bytes], spec: TapSpec, shard: int) -> None:
        self._spec, self._schema = spec, _schema(spec, shard)
        self._ranges = spec.chunks_of(shard)
        self._num_written = 0
        self._writer = pa.ipc.new_file(file, self._schema)

    def write(self, chunk: "torch.Tensor") -> None:
        """Adds the next chunk, ``[256, *shape]``, the tap's last one shorter, of any type and on any device."""
        if self._num_written == len(self._ranges):
            raise ValueError(f"more than the {len(self._ranges)} chunks of the shard")
        items = self._ranges[self._num_written]
        values = _stored(chunk, self._spec, len(items))
        batch = pa.record_batch([_as_lists(values, self._spec)], schema=self._schema)
        self._writer.write_batch(batch, custom_metadata={"crc32": _checksum(values, items)})
        self._num_written += 1

    def finish(self) -> None:
        """Writes the footer, without which the file is none; hence not after an error."""
        if self._num_written < len(self._ranges):
            raise ValueError(f"{self._num_written} of the {len(self._ranges)} chunks of the shard")
        self._writer.close()


def fault_in(path: Path, spec: TapSpec, shard: int) -> str | None:
    """Returns what is wrong with a shard's file, which is read in full; None if it is whole.

    A file that this process has found whole, and that is still the same by inode, size and time, isn't read again.

    Raises:
        OSError: it isn't there, or can't be read, which says nothing about its content.
    """
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        identity = (spec.key.digest, shard, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if identity in _verified:
            return None
        try:
            whole = ShardFile(file, spec, shard)
            for number in range(len(whole.chunks)):
                whole.check(number)
                whole.drop_pages()
        except (ValueError, pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # Arrow's own about a file's content have none
                raise
            return reason(error)
    _verified.add(identity)
    return None


class ShardFile:
    """A shard's file, mapped into memory: what is read of it comes from the page cache.

    Attributes:
        chunks: the values of each chunk, ``[items, values of an item]``, which lie in the map.
        offsets: where each chunk's values begin in the file.

    Raises:
        OSError, ValueError, pa.ArrowException: the file can't be that shard; its values aren't looked at.
    """

    def __init__(self, file: IO[bytes], spec: TapSpec, shard: int) -> None:
        self._ranges = spec.chunks_of(shard)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = pa.py_buffer(self._map)
        reader = pa.ipc.open_file(whole)
        if not reader.schema.equals(_schema(spec, shard), check_metadata=True):
            raise ValueError("is of another tap or shard")
        if reader.num_record_batches != len(self._ranges):
            raise ValueError(f"holds {reader.num_record_batches} of {len(self._ranges)} chunks")
        batches = [reader.get_batch_with_custom_metadata(number) for number in range(len(self._ranges))]
        buffers = [_buffer(read.batch, spec, items) for read, items in zip(batches, self._ranges, strict=True)]
        self.offsets = [buffer.address - whole.address for buffer in buffers]
        self.chunks = [_values(buffer, spec, items) for buffer, items in zip(buffers, self._ranges, strict=True)]
        self._checksums = [(read.custom_metadata or {}).get(b"crc32") for read in batches]

    def check(self, number: int) -> None:
        """Reads a chunk in full. Raises `ValueError` unless it is what was written."""
        items = self._ranges[number]
        if self._checksums[number] != _checksum(self.chunks[number], items):
            raise ValueError(f"its items {items.start}..{items.stop - 1} don't match their checksum")

    def drop_pages(self) -> None:
        """Gives the memory back in which the map is resident; the page cache keeps what it holds."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _schema(spec: TapSpec, shard: int) -> pa.Schema:
    _, value_type = _VALUE_TYPES[spec.key.dtype]
    about = {"tap": spec.key.digest, "shard": str(shard), "shape": ",".join(map(str, spec.shape))}
    column = pa.field("value", pa.list_(value_type, spec.num_values), nullable=False)
    return pa.schema([column], metadata=about)


def _stored(chunk: "torch.Tensor", spec: TapSpec, num_items: int) -> npt.NDArray[Any]:
    """Returns the values of a chunk as they are stored, ``[items, values of an item]``."""
    import torch

    if tuple(chunk.shape) != (num_items, *spec.shape):
        raise ValueError(f"a chunk of shape {tuple(chunk.shape)} where {(num_items, *spec.shape)} belongs")
    stored = chunk.detach().to(torch_dtype(spec)).cpu().contiguous()
    if spec.key.dtype == "fp16" and bool((stored.isinf().to(chunk.device) & ~chunk.isinf()).any()):
        raise ConfigError(
            f"taps.dtype=fp16: boundary {spec.key.boundary} of {spec.key.backbone} has values beyond 65504, "
            "where fp16 ends; use bf16 or fp32"
        )
    bits = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
    values: npt.NDArray[Any] = bits.reshape(num_items, spec.num_values).numpy()
    return values


def _as_lists(values: npt.NDArray[Any], spec: TapSpec) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=_schema(spec, 0).field("value").type)


def _buffer(batch: pa.RecordBatch, spec: TapSpec, items: range) -> pa.Buffer:
    """Returns the part of the file that holds the values of a batch."""
    if batch.num_rows != len(items):
        raise ValueError(f"holds a chunk of {batch.num_rows} items where {len(items)} belong")
    buffer = batch.column(0).buffers()[-1]
    if buffer is None or buffer.size < len(items) * spec.item_bytes:
        raise ValueError("holds a chunk that is cut short")
    return buffer


def _values(buffer: pa.Buffer, spec: TapSpec, items: range) -> npt.NDArray[Any]:
    values = np.frombuffer(buffer, numpy_dtype(spec), len(items) * spec.num_values)
    return values.reshape(len(items), spec.num_values)


def _checksum(values: npt.NDArray[Any], items: range) -> bytes:
    return b"%08x" % zlib.crc32(values.data, items.start)
