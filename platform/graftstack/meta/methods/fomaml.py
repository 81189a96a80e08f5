"""First-order MAML: the inner loop's gradients count as constants.

Finn, Abbeel & Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.2:

    theta' = theta - alpha grad_theta L_S(f_theta),    meta-gradient = grad_theta' L_Q(f_theta')

No second derivative is taken: d theta' / d theta is the identity.
"""

from graftstack.config.meta import BatchNormMode
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.inner_loop import adapt, query_logits, support_loss
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import Outcome, Prediction, outcome_of
from graftstack.meta.network import Network, Params


class FirstOrderMaml:
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
        rates = dict.fromkeys(params, self._inner.lr)
        adapted, losses = adapt(params, [loss] * num_steps, rates, second_order=False)
        return Prediction(query_logits(self._network, adapted, statistics, batch, self._batchnorm), losses)
