"""The inner loop: a few steps of gradient descent on an episode's support set, and how its queries are then seen.

All of it is plain tensor arithmetic on `torch.func`, so that it can be differentiated, and mapped over a stack of
episodes by `torch.func.vmap`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from graftstack.config.meta import BatchNormMode
from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.network import Network, Params
from graftstack.meta.second_order import twice_differentiable

Loss = Callable[[Params], Tensor]
"""Parameters -> a scalar."""


class Adapted(NamedTuple):
    """Where the inner loop ends."""

    params: Params
    losses: Tensor
    """The loss before each step, [steps]; detached."""


class Features(NamedTuple):
    """Of an episode's images."""

    support: Tensor
    """[ways * shots, D]"""
    queries: Tensor
    """[ways * queries, D]"""


def adapt(
    params: Params, losses: Sequence[Loss], rates: Mapping[str, float | Tensor], *, second_order: bool = True
) -> Adapted:
    """Takes one step of gradient descent on each of `losses`: theta <- theta - rate * gradient.

    Args:
        params: theta. Those that are to adapt.
        losses: One for each step.
        rates: The learning rate of each parameter, by the same names: a number, or a tensor of its shape.
        second_order: Whether the result is differentiated through the gradients too; else they count as constants.
    """
    values = []
    with twice_differentiable() if second_order else nullcontext():
        for loss in losses:
            at = params if second_order else detached(params)
            gradient, value = grad_and_value(loss)(at)
            params = {name: theta - rates[name] * gradient[name] for name, theta in params.items()}
            values.append(value.detach())
    return Adapted(params, torch.stack(values))


def support_loss(network: Network, statistics: Params, support: Tensor, labels: Tensor) -> Loss:
    """Returns the cross-entropy of support images[N, 3, H, W], which are normalised with their own moments."""

    def loss(params: Params) -> Tensor:
        with batch_statistics():
            return F.cross_entropy(network.logits(params, statistics, support), labels)

    return loss


def query_logits(
    network: Network, params: Params, statistics: Params, batch: EpisodeBatch, mode: BatchNormMode
) -> Tensor:
    """Returns the logits of the queries, [ways * queries, ways].

    transductive: normalised with the moments of the queries; inductive: with those of the support set, so that the
    logits of a query depend on no other.
    """
    if mode is BatchNormMode.inductive and network.has_batchnorm:
        features = episode_features(network, params, statistics, batch, mode).queries
    else:
        with batch_statistics():
            features = network.features(params, statistics, batch.queries)
    return network.head(params, features)


def episode_features(
    network: Network, params: Params, statistics: Params, batch: EpisodeBatch, mode: BatchNormMode
) -> Features:
    """Returns the features of support set and queries, normalised as in `support_loss` and `query_logits`."""
    if mode is BatchNormMode.transductive:
        with batch_statistics():
            return Features(
                *(network.features(params, statistics, images) for images in (batch.support, batch.queries))
            )
    num = len(batch.support)
    with batch_statistics(num_rows=num):
        features = network.features(params, statistics, torch.cat([batch.support, batch.queries]))
    return Features(features[:num], features[num:])


def diverged_step(losses: Sequence[float]) -> int | None:
    """Returns the number of inner steps after which a loss is no longer finite; None: all are.

    Args:
        losses: After 0, 1, ... steps. At 0 it is the meta-parameters that are at fault, and no step.
    """
    return next((num_steps for num_steps, loss in enumerate(losses) if not math.isfinite(loss)), None)


def detached(params: Params) -> Params:
    """Returns the parameters as constants."""
    return {name: tensor.detach() for name, tensor in params.items()}
