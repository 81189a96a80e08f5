"""Who goes through the blocks of a step: this process, or several that each hold a runner."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Crew(Protocol):
    """Processes that each hold a runner, and share out the blocks of a step. They stay warm between steps.

    A runner's methods are to be pure functions of what they are given and of how it was made: a block whose process is
    lost is gone through again elsewhere.
    """

    @property
    def num_workers(self) -> int:
        """Processes, those that are still starting included."""
        ...

    @property
    def waiting_for(self) -> str | None:
        """What there must be before any block can go on, for people; None: nothing keeps them waiting."""
        ...

    def call(
        self,
        method: str,
        args_list: Sequence[Sequence[Any]],
        *,
        shared: Sequence[Any] = (),
        poll: Callable[[int], None] = lambda _: None,
    ) -> list[Any]:
        """Calls a method of the runners once for each entry of `args_list`: ``method(*shared, *args)``.

        An entry goes to whoever had the one at its place in the call before, if that one is free.

        Args:
            method: Its name.
            args_list: Positional arguments of each call that only it has.
            shared: Those that all have, and come first; they are sent once to each node, however large. NumPy arrays
                in them are read in place, and can't be written to.
            poll: Told how many calls are over: after each, and about once a second where others work.

        Returns:
            What the calls returned, in the order of `args_list`. Arrays in it may be read-only.

        Raises:
            TrainingError: nobody is left to call, or a call loses every process that makes it. The crew is closed.
            Exception: what the runner raised, of several the first in the order of `args_list`, once nothing is under
                way any more: the crew can be called again. After what `poll` raised, or an interrupt, it is closed.
        """
        ...

    def close(self) -> None:
        """Ends everything that runs and leaves nothing behind; may be called twice."""
        ...


class InlineCrew:
    """One runner in this process; it works while it is called."""

    num_workers = 1
    waiting_for = None

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def call(
        self,
        method: str,
        args_list: Sequence[Sequence[Any]],
        *,
        shared: Sequence[Any] = (),
        poll: Callable[[int], None] = lambda _: None,
    ) -> list[Any]:
        """Calls a method of the runner once for each entry of `args_list`, in order; raises what it raises."""
        results = []
        for args in args_list:
            results.append(getattr(self._runner, method)(*shared, *args))
            poll(len(results))
        return results

    def close(self) -> None:
        """Has nothing to end."""
