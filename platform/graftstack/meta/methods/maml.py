"""MAML: parameters from which one step of gradient descent is enough.

Finn, Abbeel & Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", algorithm 2, with f the
network, S the support set and Q the queries of an episode:

    theta' = theta - alpha grad_theta L_S(f_theta),    meta-gradient = grad_theta L_Q(f_theta')

taken through the step, so that second derivatives of L_S are part of it. More steps are taken likewise.
"""

from graftstack.config.meta import BatchNormMode
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.inner_loop import adapt, query_logits, support_loss
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import Outcome, Prediction, outcome_of
from graftstack.meta.network import Network, Params


class Maml:
    """theta: every parameter, the head's included; alpha: one number."""

    def __init__(self, network: Network, inner: InnerSettings, batchnorm: BatchNormMode) -> None:
        self._network = network
        self._inner = inner
        self._batchnorm = batchnorm

    def meta_parameters(self) -> Params:
        """The network's."""
        return self._network.parameters()

    def outcome(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Outcome:
        """The objective is the loss of the queries."""
        return outcome_of(self._predict(params, statistics, batch, self._inner.num_steps), batch.query_labels)

    def query_logits(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Prediction:
        """As in training."""
        return self._predict(params, statistics, batch, self._inner.num_eval_steps)

    def _predict(self, params: Params, statistics: Params, batch: EpisodeBatch, num_steps: int) -> Prediction:
        loss = support_loss(self._network, statistics, batch.support, batch.support_labels)
        adapted, losses = adapt(params, [loss] * num_steps, dict.fromkeys(params, self._inner.lr))
        return Prediction(query_logits(self._network, adapted, statistics, batch, self._batchnorm), losses)
