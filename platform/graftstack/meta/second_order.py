"""Layers whose kernels torch can differentiate only once, computed such that it can do so twice."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Generator[None]:
    """Inside, attention (of ViT) and hard sigmoids (of MobileNetV3) are made of operations with second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), _PlainOperations():
        yield


class _PlainOperations(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            func = _hardsigmoid
        return func(*args, **(kwargs or {}))


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:  # noqa: ARG001, FBT001, FBT002 - torch's own signature
    return F.relu6(x + 3) / 6
