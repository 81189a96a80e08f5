"""How much faster than the backbone a new head learns, unless the user says so.

Features differ in length and scale by orders of magnitude, so one learning rate can't suit the heads of all backbones.
A step of AdamW changes each weight by about the learning rate, and so a logit by the learning rate times the 1-norm of
the feature vector; a step of SGD by the learning rate times its squared 2-norm. Dividing by that norm makes the same
`optimizer.lr` move the logits of every backbone alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from graftstack.config.schema import OptimizerName
from graftstack.finetune.batches import normalize
from graftstack.finetune.task import Task

# Enough for a mean to a few per cent, and cheap on any backbone.
_NUM_SAMPLED = 64


class _Usual(NamedTuple):
    """The multiplier while the backbone trains too: `most` up to `norm`, and in inverse proportion beyond."""

    most: float
    norm: float


# Chosen on CIFAR-100 features of ResNet-20 and SqueezeNet, whose 1-norms are 44 and 5,800. Smaller norms, as of random
# weights, say nothing of what the features will be and don't raise the rate.
_USUAL = {OptimizerName.adamw: _Usual(10.0, 44.0), OptimizerName.sgd: _Usual(1.0, 48.0)}

# On frozen features the head is a convex problem, which bears, and to converge in a few epochs needs, a higher rate.
_ALONE = 20.0

_NORM: dict[OptimizerName, Callable[[Tensor], Tensor]] = {
    OptimizerName.adamw: lambda features: features.abs().sum(dim=1),
    OptimizerName.sgd: lambda features: features.square().sum(dim=1),
}


class HeadRate:
    """The multiplier of a training's head, a pure function of the configuration, the data and the initial weights."""

    def __init__(self, task: Task, device: torch.device) -> None:
        config = task.config.optimizer
        self._given = config.head_lr_multiplier
        if self._given is None and task.config.backbone.keep_head:
            self._given = 1.0  # a head that comes with its backbone has learnt already
        if self._given is None:
            most, norm = _USUAL[config.name]
            self._usual = most * norm / max(norm, _mean_norm(task, device))

    def multiplier(self, *, trains_alone: bool) -> float:
        """Returns by how much the head's learning rate exceeds that of the last layer group."""
        if self._given is not None:
            return self._given
        return self._usual * (_ALONE if trains_alone else 1.0)


@torch.no_grad()
def _mean_norm(task: Task, device: torch.device) -> float:
    backbone = task.model.backbone.eval()
    images = task.data.images.batch(task.data.splits.train[:_NUM_SAMPLED])
    features = backbone(normalize(images, task.preprocessing, device))
    return float(_NORM[task.config.optimizer.name](features.float()).mean())
