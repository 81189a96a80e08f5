"""A pool of warm processes on a Ray cluster: each holds a runner, and trains one unit of trials after another."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from graftstack.cluster.references import done, result_of
from graftstack.cluster.slots import RaySlots, Slot, why
from graftstack.errors import StorageError, TrainingError
from graftstack.sweep.trials import EpochEnd, Event, Unit, UnitEnd, UnitLost

# How often a call may lose its process before its caller is told.
_MAX_CALL_LOSSES = 2

# How long to wait for a call before others are given a sign of life.
_POLL_S = 1.0


class RayPool:
    """Slots in processes of the connected Ray cluster, as many as it has room for while nodes go and come.

    A unit waits in the pool until a process is there for it, and not for a certain one. A process that is lost, or
    whose runner raises, is replaced by a fresh one; `close` ends them all.

    Args:
        slots: The processes, which are the pool's from now on.
    """

    def __init__(self, slots: RaySlots) -> None:
        self._slots = slots
        self._waiting: deque[Unit] = deque()
        """Units for which no process is there."""
        self._held: dict[str, Unit] = {}
        """Units that are not over."""
        self._running: dict[Any, Slot] = {}

    @property
    def num_free(self) -> int:
        """How many units can be started now: as many as processes are idle. Where no unit is held, one may wait."""
        if not self._slots:
            return 0
        return max(len(self._slots.idle) - len(self._waiting), 0 if self._held else 1)

    def ready(self) -> int:
        """Returns how many processes have started."""
        for reference in done(self._slots.starting, 0.0):
            self._slots.welcome(reference)
        return self._slots.num_ready

    def start(self, unit: Unit) -> None:
        """Begins `unit` in the slot that has been idle for longest, or else in the first that will be."""
        assert self.num_free, "no slot is free"
        self._held[unit.name] = unit
        self._waiting.append(unit)
        self._deal()

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns what has happened since, after at most `timeout_s`, or nothing once a process is ready.

        Whatever a runner raises is the loss of its unit; a full disk is not, since the next unit would meet it too.

        Raises:
            StorageError: nothing more can be written.
            TrainingError: no process starts.
            Exception: what `make_runner` raised.
        """
        events = []
        for reference in done([*self._running, *self._slots.starting], timeout_s):
            if reference in self._running:
                events.append(self._event_of(reference))
            else:
                self._slots.welcome(reference)
        self._slots.tend()
        self._deal()
        return events

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Answers an `EpochEnd` of `unit`."""
        slot = self._slots.slot_of(unit)
        self._running[slot.call("go_on", [list(keep)])] = slot

    def call(
        self, method: str, args_list: Sequence[Sequence[Any]], *, poll: Callable[[int], None] = lambda _: None
    ) -> list[Any]:
        """Calls a method of the runners once for each entry of `args_list`, spread over all slots; no unit may run.

        Args:
            method: Its name.
            args_list: Positional arguments of each call.
            poll: Told how many calls are over, after each and about once a second.

        Returns:
            What the calls returned, in the order of `args_list`.

        Raises:
            TrainingError: a call lost its process again and again, or no process starts.
            Exception: what the runner raised.
        """
        assert not self._held, "units are running"
        calls = _Calls(method, args_list)
        try:
            while not calls.are_over:
                while self._slots.idle and calls.are_waiting:
                    calls.start(self._slots.idle.popleft())
                for reference in done([*calls.running, *self._slots.starting], _POLL_S):
                    if reference in calls.running:
                        self._collect(calls, reference)
                    else:
                        self._slots.welcome(reference)
                self._slots.tend()
                poll(len(calls.results))
        except Exception:
            for slot in calls.running.values():
                self._slots.replace(slot)
            raise
        return [calls.results[place] for place in range(len(args_list))]

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        for each in (self._running, self._waiting, self._held):
            each.clear()
        self._slots.close()

    def _deal(self) -> None:
        while self._slots.idle and self._waiting:
            slot = self._slots.idle.popleft()
            slot.unit = self._waiting.popleft()
            self._running[slot.call("start", [slot.unit])] = slot

    def _event_of(self, reference: Any) -> Event:
        from ray.exceptions import RayError

        slot = self._running.pop(reference)
        unit = slot.unit
        assert unit is not None
        try:
            event: EpochEnd | UnitEnd = result_of(reference)
        except StorageError:
            self._end(slot)
            self._slots.idle.append(slot)
            raise
        except RayError as error:
            self._end(slot)
            self._slots.lose(slot)
            return UnitLost(unit, why(error))
        except Exception as error:  # a fault of one unit is not one of the sweep
            self._end(slot)
            self._slots.replace(slot)
            return UnitLost(unit, why(error))
        if isinstance(event, UnitEnd):
            self._end(slot)
            self._slots.idle.append(slot)
        return event

    def _end(self, slot: Slot) -> None:
        assert slot.unit is not None
        del self._held[slot.unit.name]
        slot.unit = None

    def _collect(self, calls: "_Calls", reference: Any) -> None:
        from ray.exceptions import RayError

        slot = calls.running[reference]
        try:
            calls.collect(reference)
        except RayError as error:
            self._slots.lose(slot)
            calls.lose(reference, why(error))
            return
        self._slots.idle.append(slot)


class _Calls:
    """Calls of one method, some of them under way."""

    def __init__(self, method: str, args_list: Sequence[Sequence[Any]]) -> None:
        self.results: dict[int, Any] = {}
        self.running: dict[Any, Slot] = {}
        self._method = method
        self._args_list = args_list
        self._waiting = deque(range(len(args_list)))
        self._places: dict[Any, int] = {}
        self._losses: Counter[int] = Counter()

    @property
    def are_over(self) -> bool:
        return len(self.results) == len(self._args_list)

    @property
    def are_waiting(self) -> bool:
        return bool(self._waiting)

    def start(self, slot: Slot) -> None:
        place = self._waiting.popleft()
        reference = slot.call(self._method, self._args_list[place])
        self.running[reference], self._places[reference] = slot, place

    def collect(self, reference: Any) -> None:
        """Takes what a call returned. Raises what it raised, or a `RayError`; then it is still among those running."""
        self.results[self._places[reference]] = result_of(reference)
        del self.running[reference]

    def lose(self, reference: Any, why_it_was: str) -> None:
        """Lets a call be made again. Raises `TrainingError` if that has been done too often."""
        del self.running[reference]
        place = self._places[reference]
        self._losses[place] += 1
        if self._losses[place] > _MAX_CALL_LOSSES:
            raise TrainingError(f"lost {self._losses[place]} times; at last: {why_it_was}")
        self._waiting.appendleft(place)
