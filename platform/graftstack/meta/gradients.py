"""The meta-gradients of episodes, added up in their order."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from graftstack.meta.batchnorm import Found, batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.methods import Adapting, Outcome
from graftstack.meta.model import MetaModel
from graftstack.meta.network import Params

# The fields of a batch before its numbers.
_NUM_TENSORS = EpisodeBatch._fields.index("num_ways")


class EpisodeGradients(NamedTuple):
    """Of several episodes."""

    total: Params
    """Their meta-gradients, added up."""
    losses: list[Tensor]
    """Of the queries of each, scalars."""
    accuracies: list[Tensor]
    inner_losses: list[Tensor]
    """Of the support set before each step of the inner loop, [steps]; empty for embeddings."""
    moments: list[Params]
    """What BatchNorm saw in each, by the names of the running statistics; none where the method adapts: it keeps no
    running statistics."""


class Embedded(NamedTuple):
    """The images of an episode as features."""

    features: Tensor
    """fp32 [ways * (shots + queries), D], those of one class after those of another, support images first."""
    classes: Tensor
    """int64 [ways * (shots + queries)]: positions among the classes of training."""
    moments: Params
    """As in `EpisodeGradients`."""


def looped(method: Adapting, params: Params, statistics: Params, batches: Iterable[EpisodeBatch]) -> EpisodeGradients:
    """Adapts to one episode after another: on a CPU the quickest, and only one of them keeps its activations."""
    leaves = as_leaves(params)
    slopes, outcomes, accuracies = _Sum(), [], []
    for batch in batches:
        outcome = method.outcome(leaves, statistics, batch)
        slopes.add(torch.autograd.grad(outcome.objective, list(leaves.values()), materialize_grads=True))
        outcomes.append(outcome)
        accuracies.append(outcome.num_correct / len(batch.query_labels))
    return _adapted(slopes.by_name(leaves), outcomes, accuracies)


def vectorised(
    method: Adapting, params: Params, statistics: Params, batches: Iterable[EpisodeBatch]
) -> EpisodeGradients:
    """Adapts to all episodes at once: few large operations in place of many small ones, which suits a GPU."""
    all_batches = list(batches)
    like = all_batches[0]

    def outcome(params: Params, *fields: Tensor) -> tuple[Tensor, Outcome]:
        found = method.outcome(params, statistics, EpisodeBatch(*fields, like.num_ways, like.num_shots))  # type: ignore[arg-type, call-arg]
        return found.objective, found

    columns = zip(*(batch[:_NUM_TENSORS] for batch in all_batches), strict=True)
    # Channels first: for the other layout torch has no batched form of adaptive pooling.
    stacked = [torch.stack([field.contiguous() for field in fields]) for fields in columns]
    slopes, found = vmap(grad(outcome, has_aux=True), in_dims=(None, *[0] * len(stacked)))(params, *stacked)
    outcomes = [Outcome(*(field[index] for field in found)) for index in range(len(all_batches))]
    accuracies = [outcome.num_correct / len(like.query_labels) for outcome in outcomes]
    return _adapted({name: each.sum(0) for name, each in slopes.items()}, outcomes, accuracies)


def of_embeddings(
    model: MetaModel, params: Params, statistics: Params, batches: Iterable[EpisodeBatch]
) -> EpisodeGradients:
    """Embeds one episode after another, each with a loss of its own."""
    leaves = as_leaves(params)
    slopes, losses, accuracies, moments = _Sum(), [], [], []
    for batch in batches:
        embedded = embed(model, leaves, statistics, batch)
        found = model.embedding.loss(leaves, embedded.features, embedded.classes, shape_of(batch))
        slopes.add(torch.autograd.grad(found.loss, list(leaves.values()), materialize_grads=True))
        losses.append(found.loss.detach())
        accuracies.append(found.num_correct / found.num_counted)
        moments.append(embedded.moments)
    return EpisodeGradients(slopes.by_name(leaves), losses, accuracies, [], moments)


def embed(model: MetaModel, params: Params, statistics: Params, batch: EpisodeBatch) -> Embedded:
    """Returns the features of an episode, normalised with the moments of all its images together."""
    found: Found = {}
    with batch_statistics(found=found):
        features = model.features(params, statistics, torch.cat([batch.support, batch.queries]))
    support, queries = features.tensor_split([len(batch.support)])
    by_class = torch.cat([part.unflatten(0, (batch.num_ways, -1)) for part in (support, queries)], dim=1)
    classes = batch.classes.repeat_interleave(by_class.shape[1])
    return Embedded(by_class.flatten(0, 1), classes, model.network.moments(statistics, found))


def pulled_back(leaves: Params, embedded: Sequence[Embedded], slopes: Tensor) -> Params:
    """Returns the gradient by the meta-parameters of a loss whose gradient by the features is known.

    Args:
        leaves: The meta-parameters that the features were computed with.
        embedded: Episodes.
        slopes: The gradient by their features, [N, D], one episode's after another's.
    """
    total = _Sum()
    for part, slope in zip(embedded, slopes.split([len(part.features) for part in embedded]), strict=True):
        total.add(torch.autograd.grad(part.features, list(leaves.values()), slope, materialize_grads=True))
    return total.by_name(leaves)


def as_leaves(params: Params) -> Params:
    """Returns the parameters as the leaves of a graph, sharing their memory."""
    return {name: tensor.detach().requires_grad_() for name, tensor in params.items()}


def shape_of(batch: EpisodeBatch) -> EpisodeShape:
    """Returns the shape of the episode that a batch is of."""
    return EpisodeShape(batch.num_ways, batch.num_shots, len(batch.queries) // batch.num_ways)


class _Sum:
    """Gradients added up one after another, so that the bits depend on their order alone."""

    def __init__(self) -> None:
        self._total: list[Tensor] = []

    def add(self, slopes: Sequence[Tensor]) -> None:
        if not self._total:
            self._total = [slope.clone() for slope in slopes]
            return
        for total, slope in zip(self._total, slopes, strict=True):
            total.add_(slope)

    def by_name(self, leaves: Params) -> Params:
        return dict(zip(leaves, self._total, strict=True))


def _adapted(total: Params, outcomes: Sequence[Outcome], accuracies: list[Tensor]) -> EpisodeGradients:
    losses = [outcome.loss for outcome in outcomes]
    return EpisodeGradients(total, losses, accuracies, [outcome.inner_losses for outcome in outcomes], [])
