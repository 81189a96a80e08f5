"""Networks without values: how much memory a computation holds at once, found out without doing it.

Tensors here have a shape and a type, and no memory, so that a training of any size takes milliseconds. Whatever the
real one would keep is counted as it comes and goes: what autograd saves for the backward pass, gradients, and the
intermediate results of both passes, those of `torch.func` and of higher derivatives included.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Weightless:
    """A place where tensors have no values, and a count of the bytes that they would take.

    >>> place = Weightless()
    >>> with place:
    ...     x = torch.empty(256)
    ...     y = x.square().sum()
    >>> place.peak_bytes
    2052

    Args:
        on_cpu: Whether tensors say that they lie on the CPU (`FakeTensorMode`), which takes four times as long. Those
            of torch's ``meta`` device know neither autocast nor CPUs' attention, which keeps no matrix of scores.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._mode = FakeTensorMode() if on_cpu else torch.device("meta")
        self._count = _Count()

    def __enter__(self) -> "Weightless":
        self._mode.__enter__()
        self._count.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._count.__exit__(*error)  # type: ignore[no-untyped-call]
        self._mode.__exit__(*error)

    @property
    def live_bytes(self) -> int:
        """Of all tensors that are there now; those that share memory count once."""
        return self._count.live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that there ever was at once."""
        return self._count.peak_bytes

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor that there ever was."""
        return self._count.largest_bytes

    def adopt(self, module: nn.Module) -> None:
        """Takes the values of a module's parameters and buffers away; from now on they are counted."""
        with self:
            for part in module.modules():
                # Their dictionaries: whoever sets an attribute may be told that it is no parameter.
                parameters, buffers = part._parameters, part._buffers  # noqa: SLF001
                for name, parameter in parameters.items():
                    if parameter is not None:
                        like = _without_values(parameter)
                        parameters[name] = nn.Parameter(like, requires_grad=parameter.requires_grad)
                for name, buffer in buffers.items():
                    if buffer is not None:
                        buffers[name] = _without_values(buffer)


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class Unfilled(TorchFunctionMode):
    """Inside, modules are made without memory for their parameters; what a constructor computes stays what it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


class _Count(TorchDispatchMode):
    """Counts the memory behind every tensor that an operation returns, until the last tensor on it is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()  # noqa: SLF001 - its only identity
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live_bytes -= num_bytes

        self._seen[key] = weakref.ref(storage, gone)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, num_bytes)
