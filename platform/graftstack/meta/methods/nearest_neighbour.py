"""The class of the nearest support image (Cover & Hart 1967, "Nearest Neighbor Pattern Classification")."""

import torch
from torch import Tensor

from graftstack.meta.methods.prototypes import distance_logits


def nearest_neighbour(support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
    """Returns logits[Q, num_ways] of queries[Q, D]: how near the nearest image of each class in support[N, D] is.

    `support_labels`: int64 [N]. A class without images has logits of minus infinity.
    """
    nearness = distance_logits(support, queries)
    logits = nearness.new_full((len(queries), num_ways), -torch.inf)
    return logits.scatter_reduce(1, support_labels.expand(len(queries), -1), nearness, "amax")


@torch.no_grad()
def neighbours_agree(features: Tensor, classes: Tensor) -> Tensor:
    """Returns for how many of features[N, D] the nearest other one is of the same class, int64 [N]; int64 scalar."""
    nearness = distance_logits(features, features).fill_diagonal_(-torch.inf)
    return (classes[nearness.argmax(dim=1)] == classes).sum()
