"""One pass of the data through the frozen groups leaves a tap at every boundary that is asked for."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from graftstack.backbones.weights import hash_state
from graftstack.config.schema import Precision
from graftstack.data.decode import DECODER_VERSION
from graftstack.finetune.counting import counting_forwards
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.inputs import Inputs, TapInputs, TapItems
from graftstack.finetune.task import Task
from graftstack.taps.key import TapKey, TapSpec
from graftstack.taps.store import TapStore
from graftstack.taps.tap import Tap, TapMissingError


def tap_items(task: Task) -> TapItems:
    """Returns which rows the taps of a task cover: all that train or validate, and the views of those that train."""
    splits = task.data.splits
    rows = np.union1d(splits.train, splits.val)
    num_views = 0 if task.images.is_plain else task.config.augment_views or 0
    return TapItems(rows, splits.train, num_views)


def tap_spec(task: Task, boundary: int, *, dtype: str) -> TapSpec:
    """Returns the name and size of a task's tap: all that its values depend on.

    Args:
        task: The data and the backbone, with its frozen groups as they are now.
        boundary: How many layer groups the values go through, 1..num_groups.
        dtype: Of the stored values: fp32, fp16 or bf16.
    """
    items, preprocessing = tap_items(task), task.preprocessing
    augmentation = task.config.augment.value
    views = f"{augmentation} x{items.num_views} seed {task.config.seed}" if items.num_views else "none"
    key = TapKey(
        backbone=task.config.backbone.name,
        weights=hash_state(task.model.backbone.group_state(0, boundary)),
        boundary=boundary,
        preprocessing=f"{preprocessing} decoder {DECODER_VERSION} pillow {PIL.__version__}",
        precision=task.config.precision.value,
        data=task.data.fingerprint,
        rows=_digest(items.rows, items.train if items.num_views else np.empty(0, np.int64)),
        views=views,
        dtype=dtype,
    )
    return TapSpec(key=key, num_items=len(items), shape=_shapes(task)[boundary])


def tap_inputs(task: Task, tap: Tap) -> TapInputs:
    """Returns a tap of the task as what its training is fed."""
    return TapInputs(tap, tap_items(task), tap.spec.key.boundary)


def open_tap(task: Task, store: TapStore, spec: TapSpec) -> TapInputs:
    """Returns a stored tap as what a training is fed. Raises `TapMissingError` where it isn't whole."""
    return tap_inputs(task, store.open(spec))


class PassResult(NamedTuple):
    """What a pass did."""

    num_forwards: int
    """Images that went through the first layer group, counted there."""
    seconds: float


def make_shards(
    task: Task,
    store: TapStore,
    specs: Sequence[TapSpec],
    shards: Mapping[int, Sequence[int]],
    *,
    device: torch.device,
    start: TapSpec | None = None,
    on_shard: Callable[[int], None] = lambda _: None,
) -> PassResult:
    """Runs the images of some shards through the frozen groups and stores what comes out at each boundary.

    One chunk of each boundary is in memory.

    Args:
        task: The data and the backbone.
        store: Where the taps lie.
        specs: The taps of the task that are to be made.
        shards: Shard -> positions in `specs` of the taps that lack it.
        device: Where the backbone runs.
        start: A whole tap that is shallower than all of `specs`, to begin with instead of the images; where it isn't
            there, the images it is.
        on_shard: Called with the number of items after each shard.

    Raises:
        StorageFullError: the disk is full; the shards written before stay.
    """
    began = time.perf_counter()
    model = task.model.to(device)
    model.backbone.freeze(model.backbone.num_groups)
    with (
        _source(task, store, start) as source,
        counting_forwards(model.backbone, freeze_depth=model.backbone.num_groups) as count,
    ):
        for shard, lacking in shards.items():
            wanted = [specs[position] for position in lacking]
            boundaries = [spec.key.boundary for spec in wanted]
            chunks = wanted[0].chunks_of(shard)
            store.write_shards(
                wanted, shard, (_outputs(task, source, np.asarray(items), boundaries, device) for items in chunks)
            )
            on_shard(sum(map(len, chunks)))
    return PassResult(count.num_images, time.perf_counter() - began)


@contextmanager
def _source(task: Task, store: TapStore, start: TapSpec | None) -> Iterator[Inputs]:
    """Opens what a pass begins with: a tap if it is there, which a node may lack that others have, or the images."""
    try:
        tap = None if start is None else store.open(start)
    except TapMissingError:
        tap = None
    if tap is None:
        yield task.images
        return
    with tap:
        yield tap_inputs(task, tap)


@torch.no_grad()
def _outputs(
    task: Task, source: Inputs, items: np.ndarray, boundaries: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Returns for each of the ascending `boundaries` the values of `items`, a chunk, on the CPU."""
    backbone, layout = task.model.backbone, tap_items(task)
    pieces: list[list[Tensor]] = [[] for _ in boundaries]
    for batch in _batches(items, inference_batch_size(task.preprocessing.image_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=task.config.precision is Precision.bf16):
            values, reached = source.prepared(_stored(source, layout, batch), device), source.boundary
            for piece, boundary in zip(pieces, boundaries, strict=True):
                values, reached = backbone.run_groups(values, reached, boundary), boundary
                piece.append(values.cpu())
    return [torch.cat(piece) for piece in pieces]


def _batches(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _stored(source: Inputs, layout: TapItems, items: np.ndarray) -> Tensor:
    """Returns the values of some items of a tap, from whatever lies before it."""
    if isinstance(source, TapInputs):
        return source.tap.gather(items)
    is_plain = items < len(layout.rows)
    parts = [source.plain(layout.rows[items[is_plain]])] if is_plain.any() else []
    views, positions = np.divmod(items[~is_plain] - len(layout.rows), max(1, len(layout.train)))
    for view in np.unique(views):
        rows = layout.train[positions[views == view]]
        parts.append(source.training(rows, epoch=int(view)))
    return torch.cat(parts)


@torch.no_grad()
def _shapes(task: Task) -> dict[int, tuple[int, ...]]:
    """Returns the shape of one sample at each boundary."""
    backbone, size = task.model.backbone, task.preprocessing.image_size
    was_training, depth = backbone.training, backbone.freeze_depth
    backbone.eval()
    values = torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)
    shapes: dict[int, tuple[int, ...]] = {}
    for boundary in range(1, backbone.num_groups + 1):
        values = backbone.run_groups(values, boundary - 1, boundary)
        shapes[boundary] = tuple(values.shape[1:])
    backbone.freeze(depth)
    backbone.train(was_training)
    return shapes


def _digest(*arrays: np.ndarray) -> str:
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{len(array)}:".encode() + np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()
