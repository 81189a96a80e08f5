"""How often a task may fail, lose its process or run out of memory, before its base is judged by it."""

from collections import Counter
from collections.abc import Hashable
from typing import Generic, Literal, NamedTuple, TypeVar

from graftstack.errors import OutOfMemoryError, TrainingError
from graftstack.reason import reason
from graftstack.runtime import CallFailed, CallLost

T = TypeVar("T", bound=Hashable)

_MAX_FAILURES, _MAX_LOSSES, _MAX_OUT_OF_MEMORY = 1, 3, 1


class Hopeless(NamedTuple):
    """A task that isn't tried again."""

    error: Exception
    why: str


Verdict = Literal["again", "alone"] | Hopeless


class Faults(Generic[T]):
    """Counts what befell each task."""

    def __init__(self) -> None:
        self._failures: Counter[T] = Counter()
        self._losses: Counter[T] = Counter()
        self._out_of_memory: Counter[T] = Counter()

    def judged(self, task: T, end: CallFailed | CallLost) -> Verdict:
        """Returns whether a task runs again, with nothing beside it ("alone"), or not at all.

        A failure is tried once more. A lost process need not be the task's fault; after a second loss it runs alone:
        then it is known whose fault it is, and no neighbour is harmed. So does what ran out of memory.
        """
        if _is_out_of_memory(end):
            self._out_of_memory[task] += 1
            if self._out_of_memory[task] <= _MAX_OUT_OF_MEMORY:
                return "alone"
            return _hopeless(
                end, f"out of memory with nothing beside it ({told(end)}); use fewer rows or a smaller model"
            )
        if isinstance(end, CallFailed):
            self._failures[task] += 1
            if self._failures[task] <= _MAX_FAILURES:
                return "again"
            return _hopeless(end, f"{reason(end.error)} ({type(end.error).__name__}), twice")
        self._losses[task] += 1
        num = self._losses[task]
        if num > _MAX_LOSSES:
            return _hopeless(end, f"lost its process {num} times, at last: {end.why}")
        return "again" if num == 1 else "alone"


def told(end: CallFailed | CallLost) -> str:
    """Returns in a few words how a call ended."""
    return reason(end.error) if isinstance(end, CallFailed) else end.why


def _is_out_of_memory(end: CallFailed | CallLost) -> bool:
    if isinstance(end, CallFailed):
        return isinstance(end.error, MemoryError | OutOfMemoryError)
    return end.is_out_of_memory


def _hopeless(end: CallFailed | CallLost, why: str) -> Hopeless:
    return Hopeless(end.error if isinstance(end, CallFailed) else TrainingError(why), why)
