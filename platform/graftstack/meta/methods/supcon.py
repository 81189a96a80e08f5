"""Supervised contrastive learning: images of a class attract each other, and repel all others.

Khosla et al. 2020, "Supervised Contrastive Learning", equation 2. With z the features at unit length, A(i) all images
of the step but i, P(i) those of them that are of i's class, and tau the temperature, the loss is the mean over i of

    -1/|P(i)|  sum_{p in P(i)}  log  exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau)

It knows neither support images nor queries. A new class is the mean of its support features, as for prototypes.
"""

import torch.nn.functional as F
from torch import Tensor

from graftstack.config.meta import MethodName
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.methods.metric_learning import metric_learning
from graftstack.meta.methods.nearest_neighbour import neighbours_agree
from graftstack.meta.methods.protocols import EmbeddingLoss
from graftstack.meta.methods.prototypes import nearest_prototype
from graftstack.meta.network import Network, Params


class SupCon:
    """Learns the features alone; one loss for all episodes of a step.

    Raises:
        ConfigError: pytorch-metric-learning isn't installed.
    """

    def __init__(self, network: Network, *, temperature: float) -> None:
        self._network = network
        self._temperature = temperature
        self._loss = metric_learning("losses", MethodName.supcon).SupConLoss(temperature=temperature)

    def meta_parameters(self) -> Params:
        """The network's."""
        return self._network.parameters()

    def loss(self, params: Params, features: Tensor, classes: Tensor, shape: EpisodeShape) -> EmbeddingLoss:  # noqa: ARG002
        """Of all images of a step; an image is classified rightly if its nearest neighbour is of its class."""
        loss: Tensor = self._loss(features, classes)
        return EmbeddingLoss(loss, neighbours_agree(self.embedding(features), classes), len(classes))

    def embedding(self, features: Tensor) -> Tensor:
        """The features at unit length."""
        return F.normalize(features)

    def classify(self, support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
        """By the nearest prototype. Between unit vectors -|z - c|^2 / 2 tau is z.c / tau, but for a constant."""
        z, new = self.embedding(support), self.embedding(queries)
        return nearest_prototype(z, support_labels, new, num_ways) / (2 * self._temperature)
