"""What a method of meta-learning is: one of two kinds."""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.network import Params


class Prediction(NamedTuple):
    """What an adapted network says of the queries."""

    logits: Tensor
    """[ways * queries, ways]"""
    inner_losses: Tensor
    """The support loss before each step of the inner loop, [steps]; detached. NaN or infinite: it diverged."""


class Outcome(NamedTuple):
    """What a training episode says of the meta-parameters; all tensors, so that it passes through `torch.func.vmap`."""

    objective: Tensor
    """Scalar; its gradient by the meta-parameters is the meta-gradient."""
    loss: Tensor
    """Cross-entropy of the queries after adaptation, scalar; detached."""
    num_correct: Tensor
    """Queries classified rightly, int64 scalar."""
    inner_losses: Tensor
    """As in `Prediction`."""


class EmbeddingLoss(NamedTuple):
    """The loss of one batch of features."""

    loss: Tensor
    """Scalar."""
    num_correct: Tensor
    """Images classified rightly, int64 scalar."""
    num_counted: int
    """Of so many."""


class Adapting(Protocol):
    """The network itself learns from each support set."""

    def meta_parameters(self) -> Params:
        """Returns copies of what the outer loop learns: those of the network, and what the method adds."""
        ...

    def outcome(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Outcome:
        """Adapts to the support set in the steps of training, and measures on the queries."""
        ...

    def query_logits(self, params: Params, statistics: Params, batch: EpisodeBatch) -> Prediction:
        """Adapts to the support set in the steps of evaluation, and classifies the queries."""
        ...


class Embedding(Protocol):
    """Only what stands on the network's features learns from a support set."""

    def meta_parameters(self) -> Params:
        """Returns copies of what the outer loop learns: those of the network, and what the method adds."""
        ...

    def loss(self, params: Params, features: Tensor, classes: Tensor, shape: EpisodeShape) -> EmbeddingLoss:
        """Returns the loss of training.

        Args:
            params: The meta-parameters.
            features: fp32 [N, D], of one episode, or for a joint method of all episodes of a step, one after another;
                in each the images of one class after those of another, support images first.
            classes: The class of each, int64 [N]: positions among the classes of training.
            shape: Of each episode.
        """
        ...

    def embedding(self, features: Tensor) -> Tensor:
        """features[N, D] -> what distances are taken between, [N, D]."""
        ...

    def classify(self, support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
        """Returns the logits of queries[Q, D], as support[N, D] with labels int64 [N] has it: [Q, num_ways]."""
        ...


def outcome_of(prediction: Prediction, labels: Tensor) -> Outcome:
    """Returns the outcome whose objective is the cross-entropy of the queries, which have labels int64 [Q]."""
    loss = F.cross_entropy(prediction.logits, labels)
    return Outcome(loss, loss.detach(), num_correct(prediction.logits, labels), prediction.inner_losses)


def num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns how many rows of logits[N, C] are largest at their label, int64 scalar."""
    return (logits.argmax(dim=1) == labels).sum()
