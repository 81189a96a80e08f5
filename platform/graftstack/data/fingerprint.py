"""A short name for the content of a table: equal content, equal name, wherever and in whatever chunks it lies."""

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def fingerprint(table: pa.Table) -> str:
    """Returns 32 hexadecimal digits that depend on the names and values of all columns, and on the order of the rows.

    Images that lie in files of their own are represented by their relative paths and versions, so nothing is read.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(table.column_names):
        digest.update(f"{name}\x1f{table.num_rows}\x1f".encode())
        _add_column(digest, table[name])
    return digest.hexdigest()


def _add_column(digest: Any, column: pa.ChunkedArray) -> None:
    chunks = [_as_bytes(chunk) for chunk in column.chunks]
    # The lengths of all values before the values of all: where chunks begin and end leaves no trace.
    for chunk in chunks:
        lengths = pc.fill_null(pc.binary_length(chunk), -1)
        digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64).tobytes())
    for chunk in chunks:
        values = pc.fill_null(chunk, b"") if chunk.null_count else chunk
        if len(values):
            _, offsets, data = values.buffers()
            bounds = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
            digest.update(memoryview(data or b"")[bounds[0] : bounds[-1]])


def _as_bytes(chunk: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    is_bytes = pa.types.is_binary(chunk.type) or pa.types.is_fixed_size_binary(chunk.type)
    if not (is_bytes or pa.types.is_string(chunk.type) or pa.types.is_large_binary(chunk.type)):
        chunk = chunk.cast(pa.large_string())
    return chunk.cast(pa.large_binary())
