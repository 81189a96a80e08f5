"""A pool of one slot: this process."""

from collections.abc import Callable, Sequence
from functools import partial

from graftstack.errors import StorageError
from graftstack.reason import reason
from graftstack.sweep.trials import EpochEnd, Event, Runner, Unit, UnitEnd, UnitLost


class InlinePool:
    """Trains one unit at a time in this process; it works while it is waited for."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._unit: Unit | None = None
        self._next: Callable[[], EpochEnd | UnitEnd] | None = None

    @property
    def num_free(self) -> int:
        """1 if nothing runs, else 0."""
        return 0 if self._unit else 1

    def start(self, unit: Unit) -> None:
        """Begins `unit` at the next `wait`."""
        assert self._unit is None, "the only slot is taken"
        self._unit = unit
        self._next = partial(self._runner.start, unit)

    def wait(self, timeout_s: float) -> list[Event]:  # noqa: ARG002 - nothing happens elsewhere that could be waited for
        """Trains up to the end of an epoch, however long that takes.

        Whatever the runner raises is the loss of its unit; a full disk, or a store out of reach, is not, since the next
        unit would meet it too.

        Raises:
            StorageError: nothing more can be written.
        """
        if self._unit is None or self._next is None:
            return []
        unit, step = self._unit, self._next
        self._unit = self._next = None
        try:
            event = step()
        except StorageError:
            raise
        except Exception as error:  # a fault of one unit is not one of the sweep
            return [UnitLost(unit, reason(error))]
        if isinstance(event, EpochEnd):
            self._unit = unit
        return [event]

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Answers an `EpochEnd`; the trials in `keep` train on at the next `wait`."""
        assert self._unit is not None, "nothing runs"
        assert self._unit.name == unit.name, f"{unit.name} doesn't run"
        self._next = partial(self._runner.go_on, keep)

    def close(self) -> None:
        """Drops what runs."""
        self._unit = self._next = None
