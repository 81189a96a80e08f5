"""One step of the outer loop: the gradients of its episodes, from whoever computes them, in one order of summation."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from graftstack.config.meta import MetaConfig
from graftstack.errors import TrainingError
from graftstack.meta.crew import Crew
from graftstack.meta.episodes import training_shape
from graftstack.meta.methods import inner_settings
from graftstack.meta.model import Floats, MetaModel, MetaState
from graftstack.meta.runner import Block, BlockFeatures, BlockGradient


class StepGradient(NamedTuple):
    """What the episodes of a step say together."""

    gradient: Floats
    """The mean of their meta-gradients, [P]."""
    losses: list[float]
    """Of each episode; a joint method has one for all."""
    accuracies: list[float]
    moments: list[Floats]
    """What BatchNorm saw in each episode, [S]; empty where the method keeps no running statistics."""


def blocks_of(step: int, config: MetaConfig) -> list[Block]:
    """Returns the blocks of a step.

    How many there are depends on its episodes alone, so that sums are the same to the bit on any number of workers.
    """
    num, first = config.episodes_per_step, step * config.episodes_per_step
    bounds = [first + num * index // config.num_blocks for index in range(config.num_blocks + 1)]
    return [Block(start, stop) for start, stop in pairwise(bounds)]


def gradient_of_step(
    step: int, state: MetaState, model: MetaModel, crew: Crew, *, poll: Callable[[int], None] = lambda _: None
) -> StepGradient:
    """Returns the mean of the meta-gradients of a step's episodes, added up in their order.

    Args:
        step: Which step of the outer loop.
        state: The meta-parameters.
        model: The method.
        crew: Goes through the blocks.
        poll: As `Crew.call` has it.

    Raises:
        TrainingError: an inner loop diverged, or a loss or a gradient isn't finite.
    """
    blocks, config = blocks_of(step, model.config), model.config
    found = (_joint if config.is_joint else _separate)(blocks, state, model, crew, poll)
    if not np.isfinite(found.gradient).all():
        rates = f"optimizer.lr={config.optimizer.lr:g}"
        if config.method.adapts:
            rates = f"inner_lr={inner_settings(config).lr:g}, {rates}"
        raise TrainingError(f"{rates}: the meta-gradient of {_episodes(blocks)} isn't finite; lower the learning rate")
    return found


def _separate(
    blocks: list[Block], state: MetaState, model: MetaModel, crew: Crew, poll: Callable[[int], None]
) -> StepGradient:
    """Each episode has a loss of its own."""
    parts: list[BlockGradient] = crew.call("gradient", [[block] for block in blocks], shared=[state], poll=poll)
    return StepGradient(
        _sum([part.gradient for part in parts]) / np.float32(model.config.episodes_per_step),
        [loss for part in parts for loss in part.losses],
        [accuracy for part in parts for accuracy in part.accuracies],
        [moments for part in parts for moments in part.moments],
    )


def _joint(
    blocks: list[Block], state: MetaState, model: MetaModel, crew: Crew, poll: Callable[[int], None]
) -> StepGradient:
    """The loss is one over the features of all images; its gradient by them goes back to where they came from."""
    embedded: list[BlockFeatures] = crew.call("embed", [[block] for block in blocks], shared=[state], poll=poll)
    features = torch.from_numpy(np.concatenate([part.features for part in embedded])).requires_grad_()
    classes = torch.from_numpy(np.concatenate([part.classes for part in embedded]))
    found = model.embedding.loss(model.parameters(state), features, classes, training_shape(model.config))
    if not torch.isfinite(found.loss):
        raise TrainingError(
            f"optimizer.lr={model.config.optimizer.lr:g}: the loss of {_episodes(blocks)} is "
            f"{float(found.loss.detach())}; lower it, or set clip_grad_norm"
        )
    (slopes,) = torch.autograd.grad(found.loss, features)
    pieces = slopes.split([len(part.features) for part in embedded])
    args_list = [[block, piece.numpy()] for block, piece in zip(blocks, pieces, strict=True)]
    gradients: list[Floats] = crew.call("pull_back", args_list, shared=[state], poll=poll)
    return StepGradient(
        _sum(gradients),
        [float(found.loss.detach())],
        [float(found.num_correct / found.num_counted)],
        [moments for part in embedded for moments in part.moments],
    )


def _episodes(blocks: Sequence[Block]) -> str:
    """Returns the episodes of a step, for people."""
    first, last = blocks[0].start, blocks[-1].stop - 1
    return f"episode {first}" if first == last else f"episodes {first} to {last}"


def _sum(vectors: Sequence[Floats]) -> Floats:
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total
