"""A process of a Ray cluster that makes a runner once, and then calls its methods."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from graftstack.cluster.session import quiet_ray


class RunnerProcess:
    """Lives in a process of its own, as a Ray actor.

    Args:
        make_runner: Makes the runner when it is first needed.
        num_threads: Threads of torch; None: torch stays as it is, and isn't imported for it.
        verbose: Whether Ray's own loggers speak.
    """

    def __init__(self, make_runner: Callable[[], Any], num_threads: int | None, *, verbose: bool) -> None:
        if not verbose:
            quiet_ray()
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        self._make_runner = make_runner

    @cached_property
    def _runner(self) -> Any:
        return self._make_runner()

    def ready(self) -> None:
        """Makes the runner. Raises what making it raises."""
        _ = self._runner

    def call(self, method: str, args: Sequence[Any]) -> Any:
        """Calls a method of the runner."""
        return getattr(self._runner, method)(*args)
