"""How many queries of an episode are classified rightly, after learning from its support set."""

from typing import NamedTuple

import torch
from torch import Tensor

from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.methods import Embedding, nearest_neighbour
from graftstack.meta.model import MetaModel
from graftstack.meta.network import Params


class Score(NamedTuple):
    """Of one episode."""

    accuracy: float
    """Share of the queries that the method classifies rightly."""
    nearest_neighbour: float | None = None
    """Share that the class of the nearest support image would be right for; None where the method adapts."""
    is_diverged: bool = False
    """Whether the inner loop left the numbers; its guesses are what they are."""


def score(model: MetaModel, params: Params, statistics: Params, batch: EpisodeBatch) -> Score:
    """Returns the score of an episode by itself: after adaptation, or in features normalised with its own moments."""
    if model.config.method.adapts:
        with model.arithmetic():
            prediction = model.adapting.query_logits(params, statistics, batch)
        # What the last step breaks shows in the logits alone.
        is_diverged = not all(bool(torch.isfinite(numbers).all()) for numbers in prediction)
        return Score(_accuracy(prediction.logits, batch.query_labels), is_diverged=is_diverged)
    with torch.no_grad(), batch_statistics():
        features = model.features(params, statistics, torch.cat([batch.support, batch.queries])).cpu()
    support, queries = features.tensor_split([len(batch.support)])
    return score_features(model.embedding, support, queries, num_ways=batch.num_ways)


def score_features(method: Embedding, support: Tensor, queries: Tensor, *, num_ways: int) -> Score:
    """Returns the score of an episode of which the features are known.

    Args:
        method: Classifies them.
        support: fp32 [ways * shots, D], on the CPU, those of one class after those of another.
        queries: [ways * queries, D], likewise.
        num_ways: Classes.
    """
    support_labels, query_labels = labels(len(support), num_ways), labels(len(queries), num_ways)
    logits = method.classify(support, support_labels, queries, num_ways)
    nearest = nearest_neighbour(method.embedding(support), support_labels, method.embedding(queries), num_ways)
    return Score(_accuracy(logits, query_labels), _accuracy(nearest, query_labels))


def labels(num: int, num_ways: int) -> Tensor:
    """Returns the labels of `num` images in the order of their classes, int64 [num]."""
    return torch.arange(num_ways).repeat_interleave(num // num_ways)


def _accuracy(logits: Tensor, wanted: Tensor) -> float:
    return float((logits.argmax(dim=1) == wanted).float().mean())
