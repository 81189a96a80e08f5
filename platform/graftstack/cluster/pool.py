"""A pool of warm processes on a Ray cluster: each holds a runner, and trains one unit of trials after another."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from graftstack.cluster.process import RunnerProcess
from graftstack.cluster.references import done, result_of, why_lost
from graftstack.errors import StorageFullError, TrainingError
from graftstack.sweep.trials import EpochEnd, Event, Runner, Unit, UnitEnd, UnitLost

# How often a call may lose its process before its caller is told.
_MAX_CALL_LOSSES = 2

# How long to wait for a call before others are given a sign of life.
_POLL_S = 1.0

_MEMORY_REMEDY = "use a smaller max_concurrent_trials or batch_size"


class _Process(RunnerProcess):
    """The process of a slot; Ray's tools list it by this name."""


class _Slot:
    """The driver's end of a process, which is replaced when it is lost."""

    def __init__(self, start_process: Callable[[], Any]) -> None:
        self._start_process = start_process
        self.unit: Unit | None = None
        self._begin()

    def _begin(self) -> None:
        self._process = self._start_process()
        self.is_ready = self._process.ready.remote()

    def call(self, method: str, args: Sequence[Any]) -> Any:
        """Returns a reference to what the runner's method will return."""
        return self._process.call.remote(method, args)

    def check(self) -> None:
        """Raises what making the runner raised, which any other process would meet too."""
        from ray.exceptions import RayError

        with suppress(RayError):  # the process is gone, but not for that
            result_of(self.is_ready)

    def renew(self) -> None:
        """Starts a fresh process: what raised may have left the old one, or its GPU, in any state."""
        self.end()
        self._begin()

    def end(self) -> None:
        import ray

        ray.kill(self._process)


class RayPool:
    """Slots in processes of the connected Ray cluster, which must have room for all of them.

    The processes begin to start at once, so that their imports overlap with whatever the driver does next; `close`
    ends them. A process that is lost, or whose runner raises, is replaced by a fresh one.

    Args:
        make_runner: Called once in each process; it is pickled.
        num_slots: Processes.
        num_cpus: CPUs that each reserves.
        num_gpus: GPUs that each reserves; several processes share one of which each has a fraction.
        num_threads: Threads of torch in each; None: torch stays as it is, and isn't imported for it.
        verbose: Whether Ray's own loggers speak in the processes.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        num_slots: int,
        num_cpus: int,
        num_gpus: float = 0.0,
        num_threads: int | None = None,
        verbose: bool = False,
    ) -> None:
        import ray

        actor = ray.remote(_Process).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)
        # Put once: the runner's settings may be large, and processes are replaced.
        settings = ray.put(make_runner)

        def start_process() -> Any:
            return actor.remote(settings, num_threads, verbose=verbose)

        self._slots = [_Slot(start_process) for _ in range(num_slots)]
        self._running: dict[Any, _Slot] = {}

    @property
    def num_free(self) -> int:
        """How many units can be started now, though their process may still be importing."""
        return sum(slot.unit is None for slot in self._slots)

    def ready(self) -> int:
        """Returns how many processes are done with starting, be it in vain; their first unit will tell."""
        import ray

        started = [slot.is_ready for slot in self._slots]
        return len(ray.wait(started, num_returns=len(started), timeout=0)[0]) if started else 0

    def start(self, unit: Unit) -> None:
        """Begins `unit` in a free slot, one that is ready if there is one."""
        import ray

        free = {slot.is_ready: slot for slot in self._slots if slot.unit is None}
        assert free, "no slot is free"
        ready, starting = ray.wait(list(free), timeout=0)
        slot = free[(ready or starting)[0]]
        slot.unit = unit
        self._running[slot.call("start", [unit])] = slot

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns what has happened since, after at most `timeout_s`.

        Whatever a runner raises is the loss of its unit; a full disk is not, since the next unit would meet it too.

        Raises:
            StorageFullError: nothing more can be written.
            Exception: what `make_runner` raised.
        """
        return [self._event_of(reference) for reference in done(list(self._running), timeout_s)]

    def _event_of(self, reference: Any) -> Event:
        slot = self._running.pop(reference)
        unit, slot.unit = slot.unit, None
        assert unit is not None
        try:
            event: EpochEnd | UnitEnd = result_of(reference)
        except StorageFullError:
            raise
        except Exception as error:  # a fault of one unit is not one of the sweep
            slot.check()
            slot.renew()
            return UnitLost(unit, _why(error))
        if isinstance(event, EpochEnd):
            slot.unit = unit
        return event

    def go_on(self, unit: Unit, keep: Sequence[int]) -> None:
        """Answers an `EpochEnd` of `unit`."""
        slot = next(slot for slot in self._slots if slot.unit is not None and slot.unit.name == unit.name)
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
            TrainingError: a call lost its process again and again.
            Exception: what the runner raised.
        """
        assert self.num_free == len(self._slots), "units are running"
        calls = _Calls(method, args_list)
        idle = deque(self._slots)
        try:
            while not calls.are_over:
                while idle and calls.are_waiting:
                    calls.start(idle.popleft())
                idle.extend(calls.wait())
                poll(len(calls.results))
        except Exception:
            calls.abandon()
            raise
        return [calls.results[place] for place in range(len(args_list))]

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        import ray

        self._running.clear()
        while self._slots:
            if ray.is_initialized():
                self._slots[-1].end()
            self._slots.pop()


class _Calls:
    """Calls of one method, some of them under way."""

    def __init__(self, method: str, args_list: Sequence[Sequence[Any]]) -> None:
        self.results: dict[int, Any] = {}
        self._method = method
        self._args_list = args_list
        self._waiting = deque(range(len(args_list)))
        self._running: dict[Any, tuple[int, _Slot]] = {}
        self._losses: Counter[int] = Counter()

    @property
    def are_over(self) -> bool:
        return len(self.results) == len(self._args_list)

    @property
    def are_waiting(self) -> bool:
        return bool(self._waiting)

    def start(self, slot: _Slot) -> None:
        place = self._waiting.popleft()
        self._running[slot.call(self._method, self._args_list[place])] = place, slot

    def wait(self) -> list[_Slot]:
        """Returns the slots that are idle again."""
        from ray.exceptions import RayError

        idle = []
        for reference in done(list(self._running), _POLL_S):
            place, slot = self._running.pop(reference)
            try:
                self.results[place] = result_of(reference)
            except RayError as error:
                slot.renew()
                self._lost(place, error)
            idle.append(slot)
        return idle

    def abandon(self) -> None:
        """Ends what is under way, so that its slots are free again."""
        for _, slot in self._running.values():
            slot.renew()
        self._running.clear()

    def _lost(self, place: int, error: Exception) -> None:
        self._losses[place] += 1
        if self._losses[place] > _MAX_CALL_LOSSES:
            raise TrainingError(f"lost {self._losses[place]} times; at last: {_why(error)}") from error
        self._waiting.appendleft(place)


def _why(error: Exception) -> str:
    """Returns in one line what ended a unit or a call."""
    return why_lost(error, memory_remedy=_MEMORY_REMEDY)
