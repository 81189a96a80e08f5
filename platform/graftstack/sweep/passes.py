"""Making the taps of a sweep: each pass with a trial that knows its backbone and its images."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from graftstack.finetune.passes import make_missing
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


def make_pass(
    wanted: Pass,
    store: TapStore,
    *,
    make: Callable[[Sequence[ShardCall]], Sequence[PassResult]],
    keep: Collection[str] = (),
) -> int:
    """Makes what is missing of the taps of a pass, as `make_missing`, which says what is returned and raised.

    Args:
        wanted: The taps.
        store: Where they lie.
        make: Makes shards, one call each, in any order and wherever there is room.
        keep: Digests of taps that don't give way to those of this pass.
    """
    return make_missing(
        wanted.specs,
        store,
        make=lambda jobs: make([ShardCall(wanted.trial, *job) for job in jobs]),
        start=wanted.start,
        keep=keep,
    )
