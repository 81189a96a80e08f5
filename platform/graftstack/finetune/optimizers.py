"""Optimisers with discriminative learning rates: each layer group, and the head, has its own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graftstack.config.schema import OptimizerConfig, OptimizerName, PlainOptimizerConfig
from graftstack.finetune.model import GraftedModel


def adamw(groups: list[dict[str, Any]], _config: PlainOptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(groups, fused=True)


def sgd(groups: list[dict[str, Any]], config: PlainOptimizerConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum."""
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


OPTIMIZERS: dict[OptimizerName, Callable[[list[dict[str, Any]], PlainOptimizerConfig], torch.optim.Optimizer]] = {
    OptimizerName.adamw: adamw,
    OptimizerName.sgd: sgd,
}


def build_optimizer(model: GraftedModel, config: OptimizerConfig, *, freeze_depth: int) -> torch.optim.Optimizer:
    """Returns an optimiser over all that ever trains: the groups above `freeze_depth`, and the head.

    While a recipe keeps one of these frozen it has no gradient, so that the optimiser leaves it, and its weight decay
    and momentum, alone. Each parameter group holds its `peak_lr`; `set_lr` moves `lr`.
    """
    backbone = model.backbone
    param_groups: list[dict[str, Any]] = []
    for index in range(freeze_depth, model.head_boundary):
        peak_lr = config.lr * config.layer_decay ** (backbone.num_groups - 1 - index)
        param_groups += decay_groups((parameter for _, parameter in backbone.group_parameters(index)), peak_lr, config)
    param_groups += head_groups(model.head.parameters(), config)
    return OPTIMIZERS[config.name](param_groups, config)


def head_groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns the parameter groups of a head."""
    return [{**group, "is_head": True} for group in decay_groups(parameters, config.lr, config)]


def set_lr(optimizer: torch.optim.Optimizer, factor: float, *, head_multiplier: float) -> None:
    """Sets each group's learning rate to `factor` of its peak, and the head's to `head_multiplier` times that."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * (head_multiplier if group["is_head"] else 1.0)


def decay_groups(
    parameters: Iterable[nn.Parameter], peak_lr: float, config: PlainOptimizerConfig
) -> list[dict[str, Any]]:
    """Returns the parameter groups of what learns at one rate.

    Biases and the scales of norms, all vectors, are not decayed: pulling a scale to 0 switches channels off.
    """
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    common = {"lr": peak_lr, "peak_lr": peak_lr, "is_head": False}
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, **common},
        {"params": vectors, "weight_decay": 0.0, **common},
    ]
    return [group for group in groups if group["params"]]
