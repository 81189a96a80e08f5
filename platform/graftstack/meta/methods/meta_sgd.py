"""Meta-SGD: MAML that also learns how far to step, and in which direction.

Li, Zhou, Chen & Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", equation 2 and algorithm 1:

    theta' = theta - alpha * grad_theta L_S(f_theta),    meta-gradient = grad_(theta, alpha) L_Q(f_theta')

where alpha has the shape of theta and * is elementwise. The paper draws alpha at random from [0.005, 0.1]; here all of
it begins at one number.
"""

import torch

from graftstack.config.meta import BatchNormMode
from graftstack.finetune.model import without_prefix
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.inner_loop import adapt, query_logits, support_loss
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import Outcome, Prediction, outcome_of
from graftstack.meta.network import Network, Params

PREFIX = "inner_lr."
"""Before a parameter's name: its learning rates."""


class MetaSgd:
    """theta: every parameter, the head's included; alpha: ``inner_lr.NAME`` for each of them."""

    def __init__(self, network: Network, inner: InnerSettings, batchnorm: BatchNormMode) -> None:
        self._network = network
        self._inner = inner
        self._batchnorm = batchnorm

    def meta_parameters(self) -> Params:
        """The network's, and a learning rate for each entry of each of them."""
        theta = self._network.parameters()
        return theta | {PREFIX + name: torch.full_like(tensor, self._inner.lr) for name, tensor in theta.items()}

    def outcome(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Outcome:
        """The objective is the loss of the queries."""
        return outcome_of(self._predict(params, statistics, batch, self._inner.num_steps), batch.query_labels)

    def query_logits(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Prediction:
        """As in training."""
        return self._predict(params, statistics, batch, self._inner.num_eval_steps)

    def _predict(self, params: Params, statistics: Params, batch: EpisodeBatch, num_steps: int) -> Prediction:
        alpha = without_prefix(params, PREFIX)
        theta = {name: params[name] for name in alpha}
        loss = support_loss(self._network, statistics, batch.support, batch.support_labels)
        adapted, losses = adapt(theta, [loss] * num_steps, alpha)
        return Prediction(query_logits(self._network, adapted, statistics, batch, self._batchnorm), losses)
