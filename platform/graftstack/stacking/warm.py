"""What a process keeps ready between folds: a backbone, and what is known of the taps of its frozen groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from threading import RLock
from weakref import WeakKeyDictionary

import numpy as np
import torch

from graftstack.backbones.backbone import Backbone
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import TapsConfig
from graftstack.data.load import ImageData
from graftstack.finetune.inputs import Rows
from graftstack.finetune.model import GraftedModel
from graftstack.finetune.tapping import open_tap, tap_items, tap_spec
from graftstack.finetune.task import Task, Workbench
from graftstack.taps.key import TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import TapMissingError

# Tasks of one process share a backbone: threads take turns.
_TURN = RLock()

# Hashing the frozen groups takes longer than a probe does. A backbone that is read anew is another object.
_SPECS: WeakKeyDictionary[Backbone, dict[str, TapSpec]] = WeakKeyDictionary()


@cache
def _workbench() -> Workbench:
    return Workbench()


@contextmanager
def lent_task(config: FinetuneConfig, data: ImageData) -> Iterator[Task]:
    """Lends a training with the backbone's initial weights, until the block ends. Raises as `Workbench.task`."""
    with _TURN:
        yield _workbench().task(config, data=data)


@contextmanager
def lent_model(config: FinetuneConfig, *, num_classes: int) -> Iterator[GraftedModel]:
    """Lends the backbone with its initial weights and a new head, until the block ends. Raises as `Workbench.model`."""
    with _TURN:
        yield _workbench().model(config, num_classes=num_classes)


def data_of(config: FinetuneConfig) -> ImageData:
    """Returns the images of a configuration, split as its training splits them. Raises as `Workbench.task`."""
    with _TURN:
        return _workbench().task(replace(config, epochs=0)).data


def device_of(config: FinetuneConfig) -> torch.device:
    """Returns where this process computes: on a GPU if workers are to have one and this process has."""
    return torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")


def store_of(config: FinetuneConfig, taps: TapsConfig) -> TapStore:
    """Returns where the taps of a training lie."""
    return TapStore(taps.location, budget_bytes=taps.budget_bytes, cache_dir=config.data.cache_dir)


def common_spec(task: Task, data: ImageData, taps: TapsConfig) -> TapSpec | None:
    """Returns the tap that all folds, refits and a sweep of the same data share: of all that trains or validates.

    Args:
        task: Of any rows of the data; its frozen groups have their initial weights.
        data: The whole.
        taps: How values are stored.

    Returns:
        The tap, or None: no group is frozen, or the data neither trains nor validates.
    """
    whole = replace(task, data=data)
    if task.boundary < 1 or not len(tap_items(whole)):
        return None
    known = _SPECS.setdefault(task.model.backbone, {})
    key = _key(whole, taps)
    if key not in known:
        known[key] = tap_spec(whole, task.boundary, dtype=taps.dtype.value)
    return known[key]


@contextmanager
def fed_by_tap(
    task: Task, data: ImageData, rows: Rows, taps: TapsConfig | None, *, trains: bool = False
) -> Iterator[Task]:
    """Gives a task the tap of the whole data where that is stored whole and has all that is asked of it.

    Else, as on a node that has no tap, it begins with the images.

    Args:
        task: Of some rows of the data.
        data: The whole.
        rows: Those that are to be read.
        taps: Where taps lie; None: there are none.
        trains: Whether they are read as a training sees them, with its random changes.
    """
    spec = (
        None
        if taps is None or not _covers(replace(task, data=data), rows, trains=trains)
        else (common_spec(task, data, taps))
    )
    if taps is None or spec is None:
        yield task
        return
    store = store_of(task.config, taps)
    try:
        inputs = open_tap(replace(task, data=data), store, spec) if store.is_complete(spec) else None
    except TapMissingError:  # evicted since
        inputs = None
    if inputs is None:
        yield task
        return
    with inputs.tap:
        yield replace(task, tap=inputs)


def _covers(whole: Task, rows: Rows, *, trains: bool) -> bool:
    items = tap_items(whole)
    if not trains or whole.images.is_plain:
        return bool(np.isin(rows, items.rows).all())
    return items.num_views > 0 and bool(np.isin(rows, items.train).all())


def _key(whole: Task, taps: TapsConfig) -> str:
    config, splits = whole.config, whole.data.splits
    digest = blake2b(digest_size=16)
    for rows in (splits.train, splits.val):
        digest.update(f"{len(rows)}:".encode() + np.ascontiguousarray(rows).tobytes())
    values = (whole.boundary, whole.preprocessing, config.precision, config.augment, config.augment_views, config.seed)
    return f"{values} {taps.dtype} {whole.data.fingerprint} {digest.hexdigest()}"
