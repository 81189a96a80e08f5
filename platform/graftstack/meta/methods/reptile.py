"""Reptile: towards where gradient descent on an episode ends.

Nichol, Achiam & Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 2 (its batched version): phi is
where SGD on the support set leads from theta, and the outer loop's optimiser is given

    meta-gradient = theta - phi = grad_theta 1/2 |theta - phi|^2,    phi held constant

as the paper proposes for optimisers such as Adam. The inner loop is plain SGD, where the paper's experiments take Adam,
on minibatches that go through the support set one after another, all classes alike. Queries say how good phi is, and
teach nothing.
"""

import torch
from torch import Tensor

from graftstack.config.meta import BatchNormMode
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.inner_loop import Adapted, Loss, adapt, detached, query_logits, support_loss
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import Outcome, Prediction, outcome_of
from graftstack.meta.network import Network, Params


class Reptile:
    """theta: every parameter, the head's included. `batch_size`: support images of an inner step; None: all."""

    def __init__(
        self, network: Network, inner: InnerSettings, batchnorm: BatchNormMode, *, batch_size: int | None = None
    ) -> None:
        self._network = network
        self._inner = inner
        self._batchnorm = batchnorm
        self._batch_size = batch_size

    def meta_parameters(self) -> Params:
        """The network's."""
        return self._network.parameters()

    def outcome(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Outcome:
        """The objective is half the squared distance to phi."""
        phi, losses = self._adapt(params, statistics, batch, self._inner.num_steps)
        distance = torch.stack([(theta - phi[name]).square().sum() for name, theta in params.items()]).sum()
        logits = query_logits(self._network, phi, statistics, batch, self._batchnorm)
        return outcome_of(Prediction(logits, losses), batch.query_labels)._replace(objective=distance / 2)

    def query_logits(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Prediction:
        """As in training."""
        phi, losses = self._adapt(params, statistics, batch, self._inner.num_eval_steps)
        return Prediction(query_logits(self._network, phi, statistics, batch, self._batchnorm), losses)

    def _adapt(self, params: Params, statistics: Params, batch: EpisodeBatch, num_steps: int) -> Adapted:
        losses = self._minibatch_losses(statistics, batch, num_steps)
        return adapt(detached(params), losses, dict.fromkeys(params, self._inner.lr), second_order=False)

    def _minibatch_losses(self, statistics: Params, batch: EpisodeBatch, num_steps: int) -> list[Loss]:
        num = len(batch.support)
        size = min(self._batch_size or num, num)
        # The first images of all classes, then their second ones, and so on; from the last on to the first again.
        order = torch.arange(num).view(batch.num_ways, batch.num_shots).T.flatten()
        rows = order.repeat(-(-num_steps * size // num))[: num_steps * size].view(num_steps, size)

        def loss(chosen: Tensor) -> Loss:
            return support_loss(self._network, statistics, batch.support[chosen], batch.support_labels[chosen])

        return [loss(chosen) for chosen in rows.to(batch.support.device)]
