"""What each rank computes in each step: a pure function of (seed, step, rank, world_size)."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.schema import Augment, FinetuneConfig
from graftstack.data.batches import epoch_order, shard
from graftstack.data.load import ImageData
from graftstack.finetune.augment import augment
from graftstack.seeding import derive_seed


class Batch(NamedTuple):
    """Images and their classes."""

    images: Tensor
    """uint8, [B, 3, S, S]"""
    labels: Tensor
    """int64, [B]"""


class StepBatches(NamedTuple):
    """What one rank does in one step."""

    step: int
    batches: list[Batch]
    """One for each accumulation."""
    total_weight: float
    """Sum of the class weights of all images of the step, over all ranks: what the summed loss is divided by."""
    num_images: int
    """Images of the step, over all ranks."""


class Sharding(NamedTuple):
    """The part of one rank."""

    rank: int
    world_size: int


def steps_per_epoch(config: FinetuneConfig, num_rows: int) -> int:
    """Returns how many whole steps an epoch holds; the rest of its random order is left for another epoch."""
    return num_rows // (config.batch_size * config.accumulate)


def step_batches(
    config: FinetuneConfig,
    data: ImageData,
    class_weights: Tensor,
    steps: Iterable[int],
    part: Sharding,
) -> Iterator[StepBatches]:
    """Yields what `part` computes in each of `steps`.

    A step takes the same images on any number of workers: its slice of the epoch's order, shared out over the ranks.
    """
    rows = data.splits.train
    per_step = config.batch_size * config.accumulate
    per_epoch = steps_per_epoch(config, len(rows))
    order_of_epoch: tuple[int, np.ndarray] | None = None
    weights = class_weights.numpy()
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        if order_of_epoch is None or order_of_epoch[0] != epoch:
            order_of_epoch = epoch, rows[epoch_order(len(rows), seed=config.seed, epoch=epoch)]
        chosen = order_of_epoch[1][position * per_step : (position + 1) * per_step]
        mine = shard(chosen, rank=part.rank, world_size=part.world_size)
        yield StepBatches(
            step=step,
            batches=[_batch(config, data, piece, epoch) for piece in np.array_split(mine, config.accumulate)],
            total_weight=float(weights[data.labels[chosen]].sum()),
            num_images=len(chosen),
        )


def prefetch(items: Iterator[StepBatches]) -> Iterator[StepBatches]:
    """Yields `items`, the next one made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="graftstack-batches") as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item


def normalize(images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Returns uint8 images [B, 3, S, S] as floats, normalised as the backbone expects, on `device`."""
    scaled = images.to(device, non_blocking=True).float()
    mean = torch.tensor(preprocessing.mean, device=device).mul_(255).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).mul_(255).view(1, 3, 1, 1)
    return scaled.sub_(mean).div_(std)


def _batch(config: FinetuneConfig, data: ImageData, rows: np.ndarray, epoch: int) -> Batch:
    images = data.images.batch(rows)
    if config.augment is not Augment.none:
        seeds = [derive_seed(config.seed, "augment", epoch, int(row)) for row in rows]
        images = augment(images, config.augment, seeds)
    return Batch(images, torch.from_numpy(data.labels[rows]))
