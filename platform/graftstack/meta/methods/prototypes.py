"""Prototypical networks: a class is the mean of its support features.

Snell, Swersky & Zemel 2017, "Prototypical Networks for Few-shot Learning", equations 1 and 2, with squared Euclidean
distances:

    c_k = mean of f(x) over the support images x of class k,    p(y = k | x) = softmax_k(-|f(x) - c_k|^2)

Training minimises -log p of the queries. The distances are computed as in their equation 8,

    -|z - c|^2 = 2 z.c - |c|^2 - |z|^2

without the last term, which is the same for all classes, and so takes no part in p.
"""

import torch.nn.functional as F
from torch import Tensor

from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.methods.protocols import EmbeddingLoss, num_correct
from graftstack.meta.network import Network, Params


class Prototypes:
    """Learns the features alone."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def meta_parameters(self) -> Params:
        """The network's."""
        return self._network.parameters()

    def loss(self, params: Params, features: Tensor, classes: Tensor, shape: EpisodeShape) -> EmbeddingLoss:  # noqa: ARG002
        """Of one episode: its queries."""
        by_class = features.unflatten(0, (shape.num_ways, shape.num_shots + shape.num_queries))
        prototypes, queries = by_class[:, : shape.num_shots].mean(dim=1), by_class[:, shape.num_shots :].flatten(0, 1)
        logits = distance_logits(prototypes, queries)
        labels = classes.new_tensor(range(shape.num_ways)).repeat_interleave(shape.num_queries)
        return EmbeddingLoss(F.cross_entropy(logits, labels), num_correct(logits, labels), len(labels))

    def embedding(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def classify(self, support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
        """By the nearest prototype."""
        return nearest_prototype(support, support_labels, queries, num_ways)


def nearest_prototype(support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
    """Returns logits[Q, num_ways] of queries[Q, D], given support[N, D] with labels int64 [N]; every class has some."""
    members = F.one_hot(support_labels, num_ways).to(support).T
    return distance_logits(members @ support / members.sum(dim=1, keepdim=True), queries)


def distance_logits(prototypes: Tensor, queries: Tensor) -> Tensor:
    """Returns -|z - c|^2 + |z|^2 for each of queries z[Q, D] and prototypes c[K, D]: [Q, K]."""
    return 2 * queries @ prototypes.T - prototypes.square().sum(dim=1)
