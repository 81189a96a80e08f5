"""Which rows a rank sees, and in what order: pure functions, so that a resumed run continues where it was."""

import numpy as np
import numpy.typing as npt

from graftstack.seeding import derive_seed


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Returns a permutation of ``0..num_rows-1``, ``int64 [num_rows]``: the same for the same (seed, epoch)."""
    return np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(num_rows)


def shard(indices: npt.NDArray[np.int64], rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Returns the piece of `indices` that `rank` takes: contiguous, and at most one longer than any other.

    The pieces of all ranks, in order of rank, are `indices`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must lie in [0, {world_size})")
    num = len(indices)
    return indices[num * rank // world_size : num * (rank + 1) // world_size]
