"""The calls of one step of a crew: which of them wait, who is to have them, and what came of the others."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from graftstack.errors import TrainingError

# A block that loses so many processes is the cause.
_MOST_BLOCK_LOSSES = 3


class Blocks:
    """The calls of a step: which of them wait, and what came of the others."""

    def __init__(self, step: int, method: str, args_list: Sequence[Sequence[Any]], shared: Any) -> None:
        self.step = step
        self.method = method
        self.args_list = args_list
        self.shared = shared
        self.results: dict[int, Any] = {}
        self._waiting = set(range(len(args_list)))
        self._in_order = iter(range(len(args_list)))
        self._again: deque[int] = deque()
        self._num_losses: Counter[int] = Counter()
        self._failure: tuple[int, Exception] | None = None

    @property
    def are_waiting(self) -> bool:
        """Whether there are some that nobody has."""
        return bool(self._waiting)

    def take(self, likes: Iterator[int]) -> int:
        """Returns the place of the next block: one that was lost, or one of `likes`, or else the first."""
        candidates = chain(_drained(self._again), likes, self._in_order)
        place = next(place for place in candidates if place in self._waiting)
        self._waiting.remove(place)
        return place

    def fail(self, place: int, error: Exception) -> None:
        """Gives up those after `place`; an earlier one may fail as well, and then that is what counts."""
        if self._counts(place):
            self._failure = place, error
            self._waiting = {other for other in self._waiting if other < place}

    def lose(self, place: int, why: str) -> None:
        """Puts a block at the front. Raises `TrainingError` if that has been done too often."""
        if not self._counts(place):
            return
        self._num_losses[place] += 1
        if self._num_losses[place] == _MOST_BLOCK_LOSSES:
            raise TrainingError(
                f"block {place + 1} of {len(self.args_list)} lost the worker that went through it "
                f"{_MOST_BLOCK_LOSSES} times; at last: {why}"
            )
        self._waiting.add(place)
        self._again.append(place)

    def outcome(self) -> list[Any]:
        """Returns the results in order, or raises what the first block that failed has raised."""
        if self._failure is not None:
            raise self._failure[1]
        return [self.results[place] for place in range(len(self.args_list))]

    def _counts(self, place: int) -> bool:
        return self._failure is None or place < self._failure[0]


def _drained(places: deque[int]) -> Iterator[int]:
    while places:
        yield places.popleft()
