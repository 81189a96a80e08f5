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
from graftstack.data.batches import epoch_order
from graftstack.finetune.task import Task
from graftstack.runtime import Worker

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


def head_rates(task: Task, worker: Worker) -> tuple[float, float]:
    """Returns how much faster than the last layer group the head learns: beside the backbone, and alone.

    The same for all ranks, and to be kept with the state: another machine would find other last digits.
    """
    config = task.config.optimizer
    given = config.head_lr_multiplier
    if task.config.backbone.keep_head and given is None:
        given = 1.0  # a head that comes with its backbone has learnt already
    if given is not None:
        return given, given
    most, norm = _USUAL[config.name]
    mean_norm = _mean_norm(task, worker.device)
    worker.mean_([mean_norm])
    usual = most * norm / max(norm, float(mean_norm))
    return usual, _ALONE * usual


@torch.no_grad()
def _mean_norm(task: Task, device: torch.device) -> Tensor:
    backbone = task.model.backbone.eval()
    rows = task.data.splits.train
    sample = rows[epoch_order(len(rows), seed=task.config.seed, epoch=0)[:_NUM_SAMPLED]]
    values = task.inputs.prepared(task.inputs.plain(sample), device)
    features = backbone.run_groups(values, task.inputs.boundary, backbone.num_groups)
    return _NORM[task.config.optimizer.name](features.float()).mean()
