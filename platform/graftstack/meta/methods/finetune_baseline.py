"""The baseline of every few-shot table: learn all training classes at once, then a new linear classifier on features.

Chen, Liu, Kira, Wang & Huang 2019, "A Closer Look at Few-shot Classification", section 3.2, "Baseline". Training
minimises the cross-entropy of one linear classifier over all training classes. For new classes the features are frozen,
and a new classifier is fitted to those of the support set,

    W <- W - alpha grad_W CE(W z + b),    from W = 0

in full batches, so that the result is a function of the support set alone. The paper takes minibatches with momentum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.methods.inner_defaults import InnerSettings
from graftstack.meta.methods.protocols import EmbeddingLoss, num_correct
from graftstack.meta.network import Network, Params


class FinetuneBaseline:
    """Learns the features, and ``classifier.weight`` and ``classifier.bias`` over all `num_classes` of training.

    The classifier's first weights come from torch's current random stream.
    """

    def __init__(self, network: Network, inner: InnerSettings, *, num_classes: int) -> None:
        self._network = network
        self._inner = inner
        self._classifier = nn.Linear(network.feature_dim, num_classes)

    def meta_parameters(self) -> Params:
        """The network's, and the classifier's."""
        params = self._network.parameters()
        like = next(iter(params.values()))
        own = self._classifier.named_parameters()
        return params | {f"classifier.{name}": tensor.detach().to(like, copy=True) for name, tensor in own}

    def loss(self, params: Params, features: Tensor, classes: Tensor, shape: EpisodeShape) -> EmbeddingLoss:  # noqa: ARG002
        """Of one episode: all its images, support images too."""
        logits = F.linear(features, params["classifier.weight"], params["classifier.bias"])
        return EmbeddingLoss(F.cross_entropy(logits, classes), num_correct(logits, classes), len(classes))

    def embedding(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def classify(self, support: Tensor, support_labels: Tensor, queries: Tensor, num_ways: int) -> Tensor:
        """By the new classifier, after the inner steps of evaluation.

        Gradients are sums of support features, so W = A^T z with a row of A for each support image, and a step is
        A <- A + alpha (Y - softmax(K A)) / N, where K[N, N] has the inner products of the support features, and Y their
        labels. The features are centred, which the bias allows for; alpha is in units of 1 / mean |z|^2, so that it
        means the same for features of any scale.
        """
        centre = support.mean(dim=0)
        z, new = support - centre, queries - centre
        mean_square = z.square().sum(dim=1).mean().clamp_min(torch.finfo(z.dtype).tiny)
        wanted = F.one_hot(support_labels, num_ways).to(z)
        rate = self._inner.lr / len(z)
        products = z @ z.T / mean_square + 1
        weights = torch.zeros_like(wanted)
        for _ in range(self._inner.num_eval_steps):
            weights = weights.add(wanted - torch.softmax(products @ weights, dim=1), alpha=rate)
        return (new @ z.T / mean_square + 1) @ weights
