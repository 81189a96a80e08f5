"""Triplet loss: an image lies nearer to one of its class than to a stranger, by a margin.

Schroff, Kalenichenko & Philbin 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", section 3.
With d the distances between features at unit length, the loss is the mean, over the triplets where it isn't zero, of

    max(0, d(a, p) - d(a, n) + margin)

with one triplet for each image a of the step: p is the furthest of its class, and n the nearest stranger further off
than p (semi-hard, section 3.2). The nearest stranger of all, as in Hermans et al. 2017, lets features fall together,
where the loss rests at the margin; and to take all triplets needs memory by the cube of the number of images.
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


class Triplet:
    """Learns the features alone; one loss for all episodes of a step.

    Raises:
        ConfigError: pytorch-metric-learning isn't installed.
    """

    def __init__(self, network: Network, *, margin: float) -> None:
        self._network = network
        self._loss = metric_learning("losses", MethodName.triplet).TripletMarginLoss(margin=margin)
        miners = metric_learning("miners", MethodName.triplet)
        self._miner = miners.BatchEasyHardMiner(pos_strategy="hard", neg_strategy="semihard")

    def meta_parameters(self) -> Params:
        """The network's."""
        return self._network.parameters()

    def loss(self, params: Params, features: Tensor, classes: Tensor, shape: EpisodeShape) -> EmbeddingLoss:  # noqa: ARG002
        """Of all images of a step; an image is classified rightly if its nearest neighbour is of its class."""
        loss: Tensor = self._loss(features, classes, self._miner(features, classes))
        return EmbeddingLoss(loss, neighbours_agree(self.embedding(features), classes), len(classes))

    def embedding(self, features: Tensor) -> Tensor:
        """The features at unit length."""
        return F.normalize(features)

    def classify(self, support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
        """By the nearest prototype."""
        return nearest_prototype(self.embedding(support), support_labels, self.embedding(queries), num_ways)
