"""The features of a backbone that nothing trains: computed once, kept in a tap, and read from then on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from graftstack.amounts import size
from graftstack.data.splits import Splits
from graftstack.errors import StorageFullError
from graftstack.finetune.model import graft
from graftstack.finetune.passes import NoRoomError, ShardJob, make_missing
from graftstack.finetune.tapping import PassResult, tap_spec
from graftstack.finetune.task import Task
from graftstack.meta.crew import Crew
from graftstack.meta.evaluation import Rows
from graftstack.meta.model import Floats, MetaState
from graftstack.meta.task import MetaTask, as_finetuning
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import Tap, TapMissingError

_Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TappedFeatures:
    """What a tap holds, as `Evaluation` asks for it."""

    tap: Tap
    rows: _Positions
    """Those that it covers, ascending."""
    num_forwards: int
    """Images that went through the backbone to make it: all that it covers, what was missing, or none."""

    def __call__(self, images: Rows) -> Floats:
        """Returns the features of images that aren't turned, [N, D]."""
        features: Floats = self.tap.gather(np.searchsorted(self.rows, images.rows)).float().numpy()
        return features

    @property
    def details(self) -> dict[str, int]:
        """What the manifest says of it."""
        return {"backbone_forwards": self.num_forwards, "unique_images": len(self.rows)}


@contextmanager
def tapped_features(
    task: MetaTask,
    state: MetaState,
    crew: Crew,
    *,
    part: str = "test",
    tell: Callable[[int, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
    poll: Callable[[int], None] = lambda _: None,
) -> Iterator[TappedFeatures | None]:
    """Opens the tap of a backbone's features for the block; the crew makes what is missing of it.

    Whatever is evaluated next on the same data with the same backbone reads the same tap: other methods, ways, shots
    and seeds.

    Args:
        task: Nothing of it is trained: its backbone has the weights that are evaluated.
        state: The same weights, as the crew takes them.
        crew: Embeds images.
        part: train, val or test: whose classes are going to be asked for.
        tell: Given (shards made, shards in all).
        say: Given a line where the tap finds no room.
        poll: As `Crew.call` has it.

    Yields:
        The features; None where the crew is to embed what each evaluation asks for: episodes are normalised each by
        itself, classes are turned, or the tap finds no room.

    Raises:
        ConfigError: the place of the taps can't be written, or features are too large for the type that they are to be
            stored in.
    """
    rows = _covered(task)
    if not _suits(task, part, rows):
        yield None
        return
    spec = tap_spec(_as_finetuning_task(task, rows), task.backbone.num_groups, dtype=task.config.taps.dtype.value)
    store = TapStore(
        task.config.taps.location, budget_bytes=task.config.taps.budget_bytes, cache_dir=task.config.data.cache_dir
    )
    make = partial(_make, store=store, rows=rows, state=state, crew=crew, tell=tell, poll=poll)
    try:
        num_forwards = make_missing({spec.key.boundary: spec}, store, make=make)
        tap = store.open(spec)
    except (NoRoomError, StorageFullError, TapMissingError) as error:
        say(f"{spec.key.backbone}: no tap ({size(spec.num_bytes)}): {error}; its features are computed anew each time")
        yield None
        return
    with tap:
        yield TappedFeatures(tap, rows, num_forwards)


def _covered(task: MetaTask) -> _Positions:
    """Returns the rows whose features are worth keeping.

    With another seed other classes are held out at random, so all rows are; classes that are held out by name, or by
    the source, are the same for every seed, and the others aren't asked for.
    """
    if task.config.eval.classes or task.data.split is not None:
        return _rows_of(task, "test")
    return np.arange(len(task.data))


def _suits(task: MetaTask, part: str, rows: _Positions) -> bool:
    """Whether a tap of `rows` has what an evaluation of a part asks for. Turned images are no rows of the data."""
    config = task.config
    is_turned = bool(getattr(task.classes, part).turns.any())
    return config.is_by_features and not is_turned and bool(np.isin(_rows_of(task, part), rows).all())


def _rows_of(task: MetaTask, part: str) -> _Positions:
    """Returns the rows of all classes of a part, ascending."""
    rows = np.unique(getattr(task.classes, part).rows)
    return rows[rows >= 0]


def _as_finetuning_task(task: MetaTask, rows: _Positions) -> Task:
    """Returns a fine-tuning of nothing but a head that trains on `rows`: sweeps and stacks know its taps too."""
    none = np.empty(0, dtype=np.int64)
    return Task(
        config=as_finetuning(task.config),
        data=replace(task.data, splits=Splits(rows, none, none)),
        model=graft(task.backbone, num_classes=2, keep_head=False, seed=task.config.seed),
        preprocessing=task.preprocessing,
        freeze_depth=task.backbone.num_groups,
        weights_used=task.weights_used,
    )


def _make(
    jobs: Sequence[ShardJob],
    *,
    store: TapStore,
    rows: _Positions,
    state: MetaState,
    crew: Crew,
    tell: Callable[[int, int], None],
    poll: Callable[[int], None],
) -> list[PassResult]:
    """Makes shards, a few of them at a time, so that all of the crew has work and little is in memory."""
    wanted = [(spec, shard) for job in jobs for spec in job.specs for shard in job.shards]
    num_at_once = 2 * crew.num_workers
    results = []
    for start in range(0, len(wanted), num_at_once):
        some = wanted[start : start + num_at_once]
        items = [rows[spec.items_of(shard).start : spec.items_of(shard).stop] for spec, shard in some]
        args_list = [[part, np.zeros_like(part)] for part in items]
        found: list[Floats] = crew.call("features", args_list, shared=[state], poll=poll)
        for (spec, shard), features in zip(some, found, strict=True):
            _write(store, spec, shard, features)
            results.append(PassResult(len(features), 0.0))
        tell(len(results), len(wanted))
    return results


def _write(store: TapStore, spec: TapSpec, shard: int, features: Floats) -> None:
    # A copy: what comes from another process may be read-only.
    store.write_shard(spec, shard, torch.tensor(features).split([len(chunk) for chunk in spec.chunks_of(shard)]))
