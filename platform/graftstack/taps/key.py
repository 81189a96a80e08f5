"""What a tap's values depend on, and how large they are: equal keys, equal values."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass

FORMAT_VERSION = 1
"""Of the files; part of every digest, so that another version's files are never looked at."""

CHUNK_ITEMS = 256
"""Items that lie together, in one record batch."""
_MAX_SHARDS = 256

DIGEST_PATTERN = re.compile("[0-9a-f]{32}")
"""What the name of a tap looks like."""

_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class TapKey:
    """All that the values of a tap depend on."""

    backbone: str
    weights: str
    """Hash of the tensors of the layer groups before the boundary."""
    boundary: int
    """The number of layer groups that the values have passed."""
    preprocessing: str
    precision: str
    """Arithmetic of the forward pass."""
    data: str
    """Fingerprint of the data."""
    rows: str
    """Digest of the rows covered, in their order."""
    views: str
    """``none``, or the augmentation, the number of its views and their seed."""
    dtype: str
    """``fp32``, ``fp16`` or ``bf16``: how the values are stored."""

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype={self.dtype}: a tap holds {', '.join(_ITEM_BYTES)}")

    @property
    def digest(self) -> str:
        """The name of the tap: 32 hex digits, the same on every machine."""
        text = json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """A tap: its key, and its size. How its items are spread over files depends on their number alone."""

    key: TapKey
    num_items: int
    shape: tuple[int, ...]
    """Of one item."""

    def __post_init__(self) -> None:
        if self.num_items < 1 or any(size < 1 for size in self.shape):
            raise ValueError(f"num_items={self.num_items}, shape={self.shape}: a tap holds at least one value")

    @property
    def num_values(self) -> int:
        """How many numbers an item is."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """The size of one item, as it is stored."""
        return self.num_values * _ITEM_BYTES[self.key.dtype]

    @property
    def num_bytes(self) -> int:
        """The size of all values; the files are larger by what describes them, about 1 KiB each."""
        return self.num_items * self.item_bytes

    @property
    def num_chunks(self) -> int:
        """The number of record batches in all files."""
        return -(-self.num_items // CHUNK_ITEMS)

    @property
    def num_shards(self) -> int:
        """The number of files, at most 256."""
        return -(-self.num_chunks // self._chunks_per_shard)

    def chunks_of(self, shard: int) -> list[range]:
        """Returns the items of each chunk of a shard."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard={shard}: the tap has {self.num_shards}")
        first = shard * self._chunks_per_shard
        last = min(first + self._chunks_per_shard, self.num_chunks)
        return [
            range(chunk * CHUNK_ITEMS, min((chunk + 1) * CHUNK_ITEMS, self.num_items)) for chunk in range(first, last)
        ]

    def items_of(self, shard: int) -> range:
        """Returns the items of a shard."""
        chunks = self.chunks_of(shard)
        return range(chunks[0].start, chunks[-1].stop)

    @property
    def _chunks_per_shard(self) -> int:
        return -(-self.num_chunks // _MAX_SHARDS)
