"""Order and sharding are pure functions."""

import numpy as np
import pytest

from graftstack.data.batches import epoch_order, shard


def test_an_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    first = epoch_order(100, seed=3, epoch=0)
    assert sorted(first.tolist()) == list(range(100))
    assert (epoch_order(100, seed=3, epoch=0) == first).all()
    assert (epoch_order(100, seed=3, epoch=1) != first).any()
    assert (epoch_order(100, seed=4, epoch=0) != first).any()


@pytest.mark.parametrize(("num_rows", "world_size"), [(10, 1), (10, 3), (2, 4), (0, 2), (97, 8)])
def test_shards_are_contiguous_nearly_equal_and_complete(num_rows: int, world_size: int) -> None:
    indices = np.arange(num_rows)[::-1]
    shards = [shard(indices, rank, world_size) for rank in range(world_size)]
    assert (np.concatenate(shards) == indices).all()
    sizes = [len(piece) for piece in shards]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        shard(np.arange(3), 2, 2)
