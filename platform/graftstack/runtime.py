"""What a training loop sees of the machine or cluster it runs on."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Worker(Protocol):
    """One of `world_size` processes that train the same model in step.

    A loop written against it doesn't know whether it runs in this process, under Ray Train or inside a trial.
    Every collective (`mean_`, `gather`, `report`) is called equally often, in the same order, by all ranks.
    """

    rank: int
    world_size: int
    device: "torch.device"

    def prepare_model(self, model: "nn.Module") -> "nn.Module":
        """Returns a module whose backward pass averages the gradients of trainable parameters over all ranks."""
        ...

    def mean_(self, tensors: "Iterable[Tensor]") -> None:
        """Replaces each floating-point tensor by its mean over all ranks, in place."""
        ...

    def gather(self, rows: "Tensor") -> "Tensor":
        """Returns the rows of all ranks, in rank order, on the CPU: [num_rows_of_all, ...]."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells the cluster of finished work; a barrier over all ranks."""
        ...


class LocalWorker:
    """The only rank of a training in this process."""

    rank = 0
    world_size = 1

    def __init__(self, device: "torch.device | None" = None) -> None:
        import torch

        self.device = device or torch.device("cpu")

    def prepare_model(self, model: "nn.Module") -> "nn.Module":
        """Returns `model` itself: there is nobody to average with."""
        return model

    def mean_(self, tensors: "Iterable[Tensor]") -> None:
        """Changes nothing: the mean over one rank."""

    def gather(self, rows: "Tensor") -> "Tensor":
        """Returns `rows` on the CPU."""
        return rows.cpu()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Does nothing: no cluster listens."""
