"""The taps that base models read: made in one pass for each backbone, before any fold begins."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from graftstack.amounts import size
from graftstack.config.plain import to_plain
from graftstack.config.schema import Augment, FinetuneConfig
from graftstack.config.sweep import TapsConfig
from graftstack.finetune.passes import NoRoomError, ShardJob, make_missing
from graftstack.finetune.tapping import PassResult, make_shards
from graftstack.stacking.image_rows import ImageRows
from graftstack.stacking.warm import common_spec, device_of, lent_task, store_of
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import TapMissingError


class ReadsTaps(Protocol):
    """A base model that begins with the outputs of frozen groups: `FinetunedBackbone`, `TapProbe`."""

    @property
    def finetuning(self) -> FinetuneConfig:
        """What it trains, or probes."""

    @property
    def taps_config(self) -> TapsConfig | None:
        """Where its taps lie; None: it reads none."""


@dataclass
class MadeTaps:
    """What was found or made."""

    num_forwards: int = 0
    """Images that went through the frozen part for it."""
    specs: list[tuple[TapStore, TapSpec]] = field(default_factory=list)
    """Those that are whole."""
    lacking: list[TapSpec] = field(default_factory=list)
    """Those that find no room: who needs them computes their values from the images, in each fold anew."""

    def hold(self) -> ExitStack:
        """Keeps the taps from eviction until what is returned is closed."""
        held = ExitStack()
        for store, spec in self.specs:
            with suppress(TapMissingError):
                held.enter_context(store.open(spec))
        return held


@dataclass
class _Trunk:
    """One backbone that sees the same images in the same way, whatever reads it where."""

    config: FinetuneConfig
    store: TapStore
    wanted: dict[int, TapSpec] = field(default_factory=dict)
    """By boundary."""

    @property
    def smallest_first(self) -> list[dict[int, TapSpec]]:
        by_size = sorted(self.wanted.items(), key=lambda item: item[1].num_bytes)
        return [{boundary: spec} for boundary, spec in by_size]


def make_taps(
    models: Iterable[ReadsTaps],
    X: ImageRows,  # noqa: N803 - as the models have it
    *,
    tell: Callable[[int, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
) -> MadeTaps:
    """Makes what is missing of the taps that base models will look for; what a sweep has left is found.

    Each image goes through each backbone once, whatever the number of models, freeze depths and folds.

    Args:
        models: The base models, unfitted.
        X: Any rows of the data: its taps cover all rows that train or validate.
        tell: Given (shards that are made, shards in all) of the backbone at hand.
        say: Given a line for each backbone whose taps find no room.

    Raises:
        ConfigError, DataError, WeightsError: there is no such backbone, or it can't be fed these images.
    """
    trunks = _trunks(models, X)
    keep = {spec.key.digest for trunk in trunks for spec in trunk.wanted.values()}
    made = MadeTaps()
    for trunk in trunks:
        make = partial(_make, trunk, X, tell)
        attempts = [trunk.wanted]
        while attempts:
            wanted = attempts.pop(0)
            try:
                made.num_forwards += make_missing(wanted, trunk.store, make=make, keep=keep)
            except NoRoomError as error:
                if len(wanted) > 1:  # some of them may fit
                    attempts = trunk.smallest_first
                    continue
                made.lacking += error.lacking
                say(_without(trunk, error))
            else:
                made.specs += [(trunk.store, spec) for spec in wanted.values()]
    return made


def bytes_to_make(models: Iterable[ReadsTaps], X: ImageRows) -> int:  # noqa: N803
    """Returns how large what is missing of the taps is that base models will look for. Raises as `make_taps`."""
    return sum(
        len(spec.items_of(shard)) * spec.item_bytes
        for trunk in _trunks(models, X)
        for spec in trunk.wanted.values()
        for shard in trunk.store.missing_shards(spec)
    )


def _trunks(models: Iterable[ReadsTaps], X: ImageRows) -> list[_Trunk]:  # noqa: N803
    found: dict[str, _Trunk] = {}
    for model in models:
        taps, config = model.taps_config, model.finetuning
        never_repeats = config.augment is not Augment.none and config.augment_views is None
        if taps is None or never_repeats:
            continue
        # Without epochs, the whole data needn't suit the batch size of a fold.
        with lent_task(_untrained(config), X.data) as task:
            spec = common_spec(task, X.data, taps)
        if spec is not None:
            # Random weights are those of a seed; frozen groups that differ have another hash at the same boundary.
            seed = config.seed if config.backbone.weights == "none" or config.augment is not Augment.none else None
            parts = (config.backbone, config.runs_dir, config.precision, config.augment, config.augment_views, taps)
            key = str([seed, task.preprocessing, config.data.cache_dir, *map(to_plain, parts)])
            trunk = found.setdefault(key, _Trunk(config, store_of(config, taps)))
            trunk.wanted[spec.key.boundary] = spec
    return list(found.values())


def _make(
    trunk: _Trunk,
    X: ImageRows,  # noqa: N803
    tell: Callable[[int, int], None],
    jobs: Sequence[ShardJob],
) -> list[PassResult]:
    results = []
    with lent_task(_untrained(trunk.config), X.data) as task:
        for number, job in enumerate(jobs, start=1):
            results.append(make_shards(task, trunk.store, *job[:2], start=job.start, device=device_of(trunk.config)))
            tell(number, len(jobs))
    return results


def _untrained(config: FinetuneConfig) -> FinetuneConfig:
    return replace(config, epochs=0)


def _without(trunk: _Trunk, error: NoRoomError) -> str:
    depths = ", ".join(str(spec.key.boundary) for spec in error.lacking)
    num_bytes = sum(spec.num_bytes for spec in error.lacking)
    return f"{trunk.config.backbone.name}: no tap at {depths} ({size(num_bytes)}): {error}; each fold computes it anew"
