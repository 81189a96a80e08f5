"""A rank of a Ray Train worker group."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class RayWorker:
    """The `Worker` inside Ray Train, one of several processes with a torch process group."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        if self.device.type == "cuda":  # objects are gathered through the current device
            torch.cuda.set_device(self.device)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Returns `model` under DDP, which sees only what trains: frozen parameters and all buffers stay out of it."""
        if self.world_size == 1:
            return model
        ignored = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # noqa: SLF001
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Averages the tensors over the ranks, all in one message."""
        parts = list(tensors)
        if self.world_size == 1 or not parts:
            return
        flat = torch.cat([part.detach().reshape(-1).double() for part in parts])
        dist.all_reduce(flat)
        flat /= self.world_size
        for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.data.copy_(mean.view(part.shape))

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all ranks, in rank order; ranks may hold different numbers of them."""
        if self.world_size == 1:
            return rows.cpu()
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, rows.cpu().numpy())
        return torch.cat([torch.from_numpy(part) for part in gathered])

    def report(self, metrics: Mapping[str, float]) -> None:
        """Reports to Ray Train, which waits for all ranks."""
        import ray.train

        ray.train.report(dict(metrics))
