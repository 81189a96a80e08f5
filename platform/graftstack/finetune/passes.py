"""Making taps: what is missing of several, in one pass, by one maker at a time."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from graftstack.errors import GraftstackError, StorageFullError
from graftstack.finetune.tapping import PassResult
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore


class ShardJob(NamedTuple):
    """One shard that is to be made: arguments of `tapping.make_shards`."""

    specs: Sequence[TapSpec]
    shards: dict[int, list[int]]
    start: TapSpec | None


class NoRoomError(GraftstackError):
    """Taps find no room, in their budget or on the disk; nothing of them is left there.

    Attributes:
        lacking: Those that aren't whole; the other taps of the pass are.
    """

    def __init__(self, why: str, lacking: list[TapSpec]) -> None:
        super().__init__(why)
        self.lacking = lacking


def make_missing(
    wanted: Mapping[int, TapSpec],
    store: TapStore,
    *,
    make: Callable[[Sequence[ShardJob]], Sequence[PassResult]],
    start: TapSpec | None = None,
    keep: Collection[str] = (),
) -> int:
    """Makes what is missing of some taps; returns how many images went through the frozen part for it.

    Another process of this machine that wants one of them waits, and then finds it made. A pass that was cut short
    goes on from its last whole shard; where a shallower tap is whole, it takes the place of the images.

    Args:
        wanted: Boundary -> the tap there; all of the same backbone and images.
        store: Where they lie.
        make: Makes shards, one job each, in any order and wherever there is room.
        start: Another tap that may be begun with, where it is whole.
        keep: Digests of taps that don't give way to these.

    Raises:
        NoRoomError: other taps in use leave too little of `taps.budget_bytes`, or of the disk, or that became full.
    """
    specs = [spec for _, spec in sorted(wanted.items())]
    known = [*specs, start] if start else specs
    with store.making(known):
        missing = {spec: store.missing_shards(spec) for spec in specs}
        lacking = {spec: shards for spec, shards in missing.items() if shards}
        if not lacking:
            return 0
        if not store.make_room(_num_bytes(lacking), keep={*keep, *(spec.key.digest for spec in known)}):
            raise NoRoomError("taps in use leave too little of taps.budget_bytes", list(lacking))
        begun_with = _start([spec for spec in known if spec not in lacking], store, before=next(iter(lacking)))
        try:
            results = make(_jobs(lacking, begun_with))
        except StorageFullError as error:
            for spec in lacking:  # while nobody else counts on them
                store.remove(spec)
            raise NoRoomError(str(error), list(lacking)) from error
        return sum(result.num_forwards for result in results)


def _num_bytes(lacking: Mapping[TapSpec, Sequence[int]]) -> int:
    return sum(len(spec.items_of(shard)) * spec.item_bytes for spec, shards in lacking.items() for shard in shards)


def _start(candidates: Sequence[TapSpec], store: TapStore, *, before: TapSpec) -> TapSpec | None:
    """Returns the deepest whole tap that is shallower than all that are to be made, or None."""
    shallower = [spec for spec in candidates if spec.key.boundary < before.key.boundary]
    by_depth = sorted(shallower, key=lambda spec: spec.key.boundary, reverse=True)
    return next((spec for spec in by_depth if store.is_complete(spec)), None)


def _jobs(lacking: Mapping[TapSpec, Sequence[int]], start: TapSpec | None) -> list[ShardJob]:
    positions: dict[int, list[int]] = defaultdict(list)
    for position, shards in enumerate(lacking.values()):
        for shard in shards:
            positions[shard].append(position)
    return [ShardJob(list(lacking), {shard: positions[shard]}, start) for shard in sorted(positions)]
