"""What each rank computes in each step: a pure function of (seed, step, rank, world_size)."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftstack.config.schema import FinetuneConfig
from graftstack.data.batches import epoch_order, shard
from graftstack.data.load import ImageData
from graftstack.finetune.inputs import Inputs


class Batch(NamedTuple):
    """Images, or what frozen groups made of them, and their classes."""

    values: Tensor
    """As stored, [B, ...]; `Inputs.prepared` makes them ready for the model."""
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


class StepRows(NamedTuple):
    """The rows of one step, over all ranks and accumulations."""

    step: int
    epoch: int
    """Counted from 0."""
    rows: np.ndarray
    """int64, [batch_size * accumulate]"""


def step_rows(config: FinetuneConfig, train_rows: np.ndarray, steps: Iterable[int]) -> Iterator[StepRows]:
    """Yields which rows each of `steps` takes: its slice of the epoch's order."""
    per_step = config.batch_size * config.accumulate
    per_epoch = steps_per_epoch(config, len(train_rows))
    order_of_epoch: tuple[int, np.ndarray] | None = None
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        if order_of_epoch is None or order_of_epoch[0] != epoch:
            order_of_epoch = epoch, train_rows[epoch_order(len(train_rows), seed=config.seed, epoch=epoch)]
        yield StepRows(step, epoch, order_of_epoch[1][position * per_step : (position + 1) * per_step])


def step_batches(
    config: FinetuneConfig,
    data: ImageData,
    inputs: Inputs,
    class_weights: Tensor,
    *,
    steps: Iterable[int],
    part: Sharding,
) -> Iterator[StepBatches]:
    """Yields what `part` computes in each of `steps`.

    A step takes the same images on any number of workers: its rows, shared out over the ranks.
    """
    weights = class_weights.numpy()
    for step, epoch, chosen in step_rows(config, data.splits.train, steps):
        mine = shard(chosen, rank=part.rank, world_size=part.world_size)
        yield StepBatches(
            step=step,
            batches=[
                Batch(inputs.training(rows, epoch=epoch), torch.from_numpy(data.labels[rows]))
                for rows in np.array_split(mine, config.accumulate)
            ],
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
