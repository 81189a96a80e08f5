"""How many threads BLAS, OpenMP and torch use for a call."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graftstack.runtime import THREADS

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# What libraries look at when they are loaded.
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def limit_threads(num: int) -> Iterator[None]:
    """Lets the libraries that are loaded use `num` threads in the block, where the calling thread calls them.

    `THREADS` tells it to code that is told a number of threads itself.
    """
    with ExitStack() as stack:
        stack.callback(THREADS.reset, THREADS.set(num))
        stack.enter_context(_controller(len(sys.modules)).limit(limits=num))
        torch: Any = sys.modules.get("torch")
        if hasattr(torch, "set_num_threads"):  # else not loaded, or only just being loaded by another thread
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(num)
        yield


def limit_threads_of_libraries_to_come(num: int) -> None:
    """Lets libraries that this process loads from now on use `num` threads."""
    os.environ.update(dict.fromkeys(_VARIABLES, str(num)))


@lru_cache(maxsize=1)
def _controller(num_modules: int) -> "ThreadpoolController":  # noqa: ARG001 - a library comes with a module
    """Finding the libraries takes milliseconds, as long as small models take to fit."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
