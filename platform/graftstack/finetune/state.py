"""The state of a training as tensors and plain values, and back: what a checkpoint holds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftstack.checkpoint import Checkpoint
from graftstack.finetune.model import GraftedModel, without_prefix


class Position(NamedTuple):
    """Where a training stands; with the tensors, all that the next step depends on."""

    step: int = 0
    """Optimiser steps done."""
    history: tuple[dict[str, float], ...] = ()
    """One row of metrics for each finished epoch."""
    best_epoch: int = 0
    """The epoch, counted from 1, with the best validation accuracy so far; 0: none yet."""
    loss_sum: float = 0.0
    """Sum of the training losses of the steps of the current epoch."""
    head_rates: tuple[float, float] = (1.0, 1.0)
    """How much faster than the last layer group the head learns: beside the backbone, and alone."""

    @property
    def best_accuracy(self) -> float:
        """The validation accuracy of the best epoch, or -1."""
        return self.history[self.best_epoch - 1]["accuracy"] if self.best_epoch else -1.0


def pack(
    position: Position,
    model: GraftedModel,
    optimizer: torch.optim.Optimizer,
    *,
    freeze_depth: int,
    facts: dict[str, str | int],
) -> Checkpoint:
    """Returns what the next step depends on and that changes, and `facts`, by which a change of the rest is noticed.

    The tensors are the live ones, not copies; those of the first `freeze_depth` groups, which never change, stay out.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.named_state(above=freeze_depth).items()}
    slots, scalars = optimizer_slots(optimizer)
    tensors |= {f"optimizer/{name}": tensor for name, tensor in slots.items()}
    return Checkpoint(position.step, tensors, {"position": position._asdict(), "optimizer": scalars, "facts": facts})


def unpack(
    checkpoint: Checkpoint, model: GraftedModel, optimizer: torch.optim.Optimizer, *, freeze_depth: int
) -> Position:
    """Puts a checkpoint's state into `model` and `optimizer` and returns where it stands."""
    model.load_named_state(without_prefix(checkpoint.tensors, "model/"), above=freeze_depth)
    load_optimizer_slots(optimizer, without_prefix(checkpoint.tensors, "optimizer/") | checkpoint.meta["optimizer"])
    position = checkpoint.meta["position"]
    return Position(**{**position, "history": tuple(position["history"]), "head_rates": tuple(position["head_rates"])})


class OptimizerSlots(NamedTuple):
    """What an optimiser remembers of its parameters, each by the parameter's number and the slot: ``0/exp_avg``."""

    tensors: dict[str, Tensor]
    """The live ones."""
    scalars: dict[str, float]


def optimizer_slots(optimizer: torch.optim.Optimizer) -> OptimizerSlots:
    """Returns the state of an optimiser, without its settings."""
    found = OptimizerSlots({}, {})
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                found.tensors[f"{index}/{slot}"] = value
            elif value is not None:
                found.scalars[f"{index}/{slot}"] = value
    return found


def load_optimizer_slots(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Takes back what `optimizer_slots` returned, tensors and scalars together."""
    slots: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, slot = name.split("/")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
