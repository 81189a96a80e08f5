"""ANIL ("almost no inner loop"): only the head adapts, to features that the outer loop alone changes.

Raghu, Raghu, Bengio & Vinyals 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML",
section 4, equation 3: MAML whose inner loop, in training and afterwards, leaves all parameters but the last layer's as
they are. With z the features of the support set, w the head and theta everything else:

    w' = w - alpha grad_w L_S(w z_theta),    meta-gradient = grad_(theta, w) L_Q(f_(theta, w'))

taken through the step, as in MAML. The images go through the backbone once, however many steps there are.
"""

import torch.nn.functional as F
from torch import Tensor

from graftstack.config.meta import BatchNormMode
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.inner_loop import adapt, episode_features
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import Outcome, Prediction, outcome_of
from graftstack.meta.network import Network, Params


class Anil:
    """w: weight and bias of the linear head; alpha: one number."""

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
        support, queries = episode_features(self._network, params, statistics, batch, self._batchnorm)

        def loss(head: Params) -> Tensor:
            return F.cross_entropy(self._network.head(head, support), batch.support_labels)

        head = {name: tensor for name, tensor in params.items() if name.startswith("head.")}
        adapted, losses = adapt(head, [loss] * num_steps, dict.fromkeys(head, self._inner.lr))
        return Prediction(self._network.head(adapted, queries), losses)
