"""BatchNorm with the moments of the batch at hand: without state, for any model, and under torch.func.

A model stays in eval mode, where its BatchNorm layers use their running statistics and update nothing in place. Inside
`batch_statistics` the same layers normalise with moments of the batch instead. They all end in
`torch.nn.functional.batch_norm`, and that call is what is replaced.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Moments(NamedTuple):
    """What a BatchNorm layer normalised with; a channel each, [C], detached."""

    mean: Tensor
    variance: Tensor
    """Unbiased, as running variances are."""


Found = dict[int, Moments]
"""By the identity of a layer's running mean."""


@contextmanager
def batch_statistics(num_rows: int | None = None, found: Found | None = None) -> Generator[None]:
    """Inside, BatchNorm normalises with the moments of the batch.

    Args:
        num_rows: With those of the batch's first rows alone, so that no other row tells on the rest; None: of all.
        found: Is told what each layer normalised with, where that is all rows. Not under `torch.func.vmap`.
    """
    with _BatchStatistics(num_rows, found):
        yield


class _BatchStatistics(TorchFunctionMode):
    def __init__(self, num_rows: int | None, found: Found | None) -> None:
        assert num_rows is None or found is None
        super().__init__()
        self._num_rows = num_rows
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            func = self._batch_norm
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        _running_var: Tensor | None,
        *,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        **_: Any,
    ) -> Tensor:
        """x[N, C, ...] -> x[N, C, ...]."""
        if self._found is not None and running_mean is not None:
            # Running averages that forget all else are the moments of the batch, and come at no cost.
            moments = Moments(torch.zeros_like(running_mean), torch.ones_like(running_mean))
            self._found[id(running_mean)] = moments
            return F.batch_norm(x, *moments, weight, bias, training=True, momentum=1.0, eps=eps)
        # Under vmap, the backward pass of BatchNorm fails for bf16 images with fp32 weights.
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        if self._num_rows is None:
            return F.batch_norm(exact, None, None, weight, bias, training=True, eps=eps).to(x.dtype)
        return _normalised_by(exact[: self._num_rows], exact, weight, bias, eps).to(x.dtype)


def _normalised_by(rows: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises x[N, C, ...] with the moments of rows[n, C, ...]."""
    variance, mean = torch.var_mean(rows, dim=[0, *range(2, x.ndim)], correction=0)
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    # Zero, but its gradient is what the means have.
    shift = (mean.detach() - mean) * scale
    if bias is not None:
        shift = shift + bias
    # With running statistics BatchNorm is a scale and a shift of each channel in one pass over x. It has no gradient by
    # those statistics.
    return F.batch_norm(x, mean.detach(), torch.ones_like(mean), scale, shift, eps=0.0)
