"""Slots on a Ray cluster: processes that each hold a runner, as many as there is room for while nodes go and come."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from graftstack.cluster.patience import Patience
from graftstack.cluster.process import RunnerProcess
from graftstack.cluster.references import last_line, result_of, why_lost
from graftstack.errors import TrainingError
from graftstack.sweep.trials import Runner, Unit

log = logging.getLogger(__name__)

# How long what the cluster has is taken for granted.
_LOOK_AGAIN_S = 1.0

# What a process that has room may take to start: a wait that is shorter isn't one for room.
_START_S = 30.0

# How many processes in a row may end before they have made their runner.
_MAX_FAILED_STARTS = 5

_MEMORY_REMEDY = "use a smaller max_concurrent_trials or batch_size"


class _Process(RunnerProcess):
    """The process of a slot; Ray's tools list it by this name."""


class Slot:
    """The driver's end of a process, which is replaced when it is lost."""

    def __init__(self, start_process: Callable[[], Any]) -> None:
        self._start_process = start_process
        self.unit: Unit | None = None
        self.begin()

    def begin(self) -> None:
        """Starts a process; Ray lets it wait for room."""
        self._process = self._start_process()
        self.has_started = False
        self.is_ready = self.check()

    def check(self) -> Any:
        """Returns a reference to nothing, which is there once the process is ready."""
        return self._process.ready.remote()

    def call(self, method: str, args: Sequence[Any]) -> Any:
        """Returns a reference to what the runner's method will return."""
        return self._process.call.remote(method, args)

    def end(self) -> None:
        """Kills the process."""
        import ray

        ray.kill(self._process)


class RaySlots:
    """Processes of the connected Ray cluster, each with a runner; `close` ends them.

    They begin to start at once, so that their imports overlap with whatever the driver does next. One that is lost is
    replaced. Where nodes have gone, those that found no room are given up, but for one; where nodes have come, there
    are more as soon as none is idle.

    Args:
        make_runner: Called once in each process; it is pickled.
        num_slots: Returns how many processes there are to be now, at most as many as the cluster can hold. Asked often.
        num_cpus: CPUs that each reserves.
        num_gpus: GPUs that each reserves; several processes share one of which each has a fraction.
        num_threads: Threads of torch in each; None: torch stays as it is, and isn't imported for it.
        patience_s: How long `tend` takes it that there is no process at all.
        say: Is told of that wait.
        verbose: Whether Ray's own loggers speak in the processes.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        num_slots: Callable[[], int],
        num_cpus: int,
        num_gpus: float = 0.0,
        num_threads: int | None = None,
        patience_s: float = 300.0,
        say: Callable[[str], None] = lambda _: None,
        verbose: bool = False,
    ) -> None:
        import ray

        actor = ray.remote(_Process).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)
        # Put once: the runner's settings may be large, and processes are replaced.
        settings = ray.put(make_runner)
        self._start_process: Callable[[], Any] = lambda: actor.remote(settings, num_threads, verbose=verbose)
        self._num_slots = num_slots
        needed = f"a process of {num_cpus} CPUs and {num_gpus:g} GPUs"
        self._patience = Patience(patience_s, needed, say, quiet_s=_START_S)
        self._slots: list[Slot] = []
        self._starting: dict[Any, Slot] = {}
        """Those of which nobody knows whether they are ready, by what will tell."""
        self.idle: deque[Slot] = deque()
        """Those that are ready and have nothing to do, the longest waiting first."""
        self._num_failed_starts = 0
        self._looked = time.monotonic()
        self._add(max(1, num_slots()))

    def __len__(self) -> int:
        """How many there are, those that have no place yet included."""
        return len(self._slots)

    @property
    def num_ready(self) -> int:
        """How many have made their runner."""
        return len(self._slots) - len(self._starting)

    @property
    def starting(self) -> list[Any]:
        """References that have an answer once `welcome` is to be called with it."""
        return list(self._starting)

    def slot_of(self, unit: Unit) -> Slot:
        """Returns the slot that has `unit`."""
        return next(slot for slot in self._slots if slot.unit is not None and slot.unit.name == unit.name)

    def welcome(self, reference: Any) -> None:
        """Learns what became of the start of a process, if it is still wanted.

        Raises:
            TrainingError: no process starts.
            Exception: what making the runner raised, which any other process would meet too.
        """
        from ray.exceptions import RayError

        slot = self._starting.pop(reference, None)
        if slot is None:
            return
        try:
            result_of(reference)
        except RayError as error:
            self._count_failed_start(slot, error)
            self.replace(slot)
            return
        slot.has_started = True
        self._num_failed_starts = 0
        self.idle.append(slot)

    def lose(self, slot: Slot) -> None:
        """Replaces a process that is gone. Others may be gone with it, so those that are idle are looked at again."""
        self.replace(slot)
        while self.idle:
            other = self.idle.popleft()
            self._starting[other.check()] = other

    def replace(self, slot: Slot) -> None:
        """Ends a process, and starts a fresh one: what raised may have left the old one, or its GPU, in any state."""
        slot.end()
        slot.begin()
        self._starting[slot.is_ready] = slot

    def tend(self) -> None:
        """Has as many processes as there is room for now; to be called about once a second, after `welcome`.

        Raises:
            TrainingError: there has been none for too long.
        """
        if self.num_ready:
            self._patience.renew()
        self._patience.check()
        now = time.monotonic()
        if now - self._looked >= _LOOK_AGAIN_S:
            self._looked = now
            self._resize(max(1, self._num_slots()))

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        import ray

        self._starting.clear()
        self.idle.clear()
        while self._slots:
            if ray.is_initialized():
                self._slots[-1].end()
            self._slots.pop()

    def _resize(self, num: int) -> None:
        if not self.idle:
            self._add(num - len(self._slots))
        waiting = [(reference, slot) for reference, slot in self._starting.items() if not slot.has_started]
        for reference, slot in waiting[::-1][: max(0, len(self._slots) - num)]:
            del self._starting[reference]
            self._slots.remove(slot)
            slot.end()

    def _add(self, num: int) -> None:
        for _ in range(num):
            slot = Slot(self._start_process)
            self._slots.append(slot)
            self._starting[slot.is_ready] = slot

    def _count_failed_start(self, slot: Slot, error: Exception) -> None:
        from ray.exceptions import RayActorError

        if slot.has_started:  # it was idle
            return
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise TrainingError(
                f"a worker of Ray can't start ({last_line(error)}); install the same packages there"
            ) from error
        self._num_failed_starts += 1
        log.warning("lost a process before it had started (%s)", why(error))
        if self._num_failed_starts >= _MAX_FAILED_STARTS:
            raise TrainingError(f"{_MAX_FAILED_STARTS} processes in a row ended as they started; at last: {why(error)}")


def why(error: Exception) -> str:
    """Returns in one line what ended what a slot did."""
    return why_lost(error, memory_remedy=_MEMORY_REMEDY)
