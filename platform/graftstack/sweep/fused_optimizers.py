"""Optimisers over stacked parameters: each of G trials has its own learning rate and decay, in one update.

Element for element they do what torch's own do, in the same order. Every tensor's first axis is the trial.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from graftstack.config.schema import OptimizerConfig, OptimizerName

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's own


class FusedOptimizer(Protocol):
    """An optimiser whose state can be kept, narrowed to some of the trials, and put back."""

    num_steps: int
    slots: dict[str, dict[str, Tensor]]
    """Slot -> parameter name -> [G, ...]."""

    def step(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: Tensor) -> None:
        """Updates `params` in place; `lr` is fp32, [G]."""

    def narrow(self, positions: Tensor) -> None:
        """Keeps the trials at `positions` only."""


class _Stacked:
    def __init__(self, params: Mapping[str, Tensor], slots: Sequence[str]) -> None:
        self.num_steps = 0
        self.slots = {slot: {name: torch.zeros_like(value) for name, value in params.items()} for slot in slots}
        self.vectors: dict[str, Tensor] = {}
        """Settings of the trials, fp32, [G]."""

    def narrow(self, positions: Tensor) -> None:
        """Keeps the trials at `positions` only."""
        self.slots = {
            slot: {name: value[positions] for name, value in values.items()} for slot, values in self.slots.items()
        }
        self.vectors = {name: vector[positions] for name, vector in self.vectors.items()}

    def decay_of(self, param: Tensor) -> Tensor:
        """Returns the weight decay for a parameter: vectors, biases and the like, have none."""
        decay = self.vectors["weight_decay"] if param.ndim > 2 else torch.zeros_like(self.vectors["weight_decay"])
        return _along(decay, param)


class FusedAdamW(_Stacked):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, params: Mapping[str, Tensor], configs: Sequence[OptimizerConfig]) -> None:
        super().__init__(params, ("exp_avg", "exp_avg_sq"))
        self.vectors["weight_decay"] = _vector([config.weight_decay for config in configs], params)

    def step(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: Tensor) -> None:
        """Updates `params` in place; `lr` is fp32, [G]."""
        self.num_steps += 1
        correction1 = 1 - _BETA1**self.num_steps
        correction2 = (1 - _BETA2**self.num_steps) ** 0.5
        for name, param in params.items():
            rate, grad = _along(lr, param), grads[name]
            mean, square = self.slots["exp_avg"][name], self.slots["exp_avg_sq"][name]
            param.mul_(1 - rate * self.decay_of(param))
            mean.lerp_(grad, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
            denominator = square.sqrt().div_(correction2).add_(_EPS)
            param.sub_(mean.div(denominator).mul_(rate / correction1))


class FusedSgd(_Stacked):
    """SGD with Nesterov momentum and L2 decay, as torch.optim.SGD."""

    def __init__(self, params: Mapping[str, Tensor], configs: Sequence[OptimizerConfig]) -> None:
        super().__init__(params, ("momentum_buffer",))
        self.vectors["weight_decay"] = _vector([config.weight_decay for config in configs], params)
        self.vectors["momentum"] = _vector([config.momentum for config in configs], params)

    def step(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: Tensor) -> None:
        """Updates `params` in place; `lr` is fp32, [G]."""
        self.num_steps += 1
        for name, param in params.items():
            momentum, buffer = _along(self.vectors["momentum"], param), self.slots["momentum_buffer"][name]
            change = grads[name] + self.decay_of(param) * param
            buffer.mul_(momentum).add_(change)
            param.sub_(change.add_(momentum * buffer).mul_(_along(lr, param)))


FUSED_OPTIMIZERS: dict[OptimizerName, Callable[[Mapping[str, Tensor], Sequence[OptimizerConfig]], FusedOptimizer]] = {
    OptimizerName.adamw: FusedAdamW,
    OptimizerName.sgd: FusedSgd,
}


def _vector(values: Sequence[float], params: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=next(iter(params.values())).device)


def _along(vector: Tensor, param: Tensor) -> Tensor:
    """Returns [G] as [G, 1, ...], to meet a parameter [G, ...]."""
    return vector.view(-1, *(1 for _ in param.shape[1:]))
