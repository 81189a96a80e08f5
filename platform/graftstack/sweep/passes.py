"""Making the taps of a sweep: what is missing, in one pass, by one maker at a time."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from graftstack.finetune.tapping import PassResult
from graftstack.sweep.plan import Pass
from graftstack.sweep.trials import Trial
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore


class ShardCall(NamedTuple):
    """The arguments of `TrialRunner.make_taps` for one shard."""

    trial: Trial
    specs: Sequence[TapSpec]
    shards: dict[int, list[int]]
    start: TapSpec | None


class NoRoomError(Exception):
    """The taps don't fit into their budget beside those that are in use."""


def make_pass(
    wanted: Pass,
    store: TapStore,
    *,
    make: Callable[[Sequence[ShardCall]], Sequence[PassResult]],
) -> int:
    """Makes what is missing of the taps of a pass; returns how many images went through the frozen part for it.

    Another process of this machine that wants one of them waits, and then finds it made. A pass that was cut short
    goes on from its last whole shard; where a shallower tap is whole, it takes the place of the images.

    Args:
        wanted: The taps.
        store: Where they lie.
        make: Makes shards, one call each, in any order and wherever there is room.

    Raises:
        NoRoomError: other taps in use leave too little of `taps.budget_bytes`, or of the disk.
        StorageFullError: the disk became full.
    """
    by_boundary = dict(sorted(wanted.specs.items()))
    with store.making(by_boundary.values()):
        missing = {boundary: store.missing_shards(spec) for boundary, spec in by_boundary.items()}
        lacking = [boundary for boundary, shards in missing.items() if shards]
        if not lacking:
            return 0
        num_bytes = sum(
            len(by_boundary[boundary].items_of(shard)) * by_boundary[boundary].item_bytes
            for boundary in lacking
            for shard in missing[boundary]
        )
        if not store.make_room(num_bytes, keep=[spec.key.digest for spec in by_boundary.values()]):
            raise NoRoomError
        whole = [boundary for boundary in by_boundary if boundary < lacking[0]]
        start = by_boundary[whole[-1]] if whole else None
        specs = [by_boundary[boundary] for boundary in lacking]
        positions: dict[int, list[int]] = defaultdict(list)
        for position, boundary in enumerate(lacking):
            for shard in missing[boundary]:
                positions[shard].append(position)
        results = make(
            [ShardCall(wanted.trial, specs, {shard: positions[shard]}, start) for shard in sorted(positions)]
        )
        return sum(result.num_forwards for result in results)
