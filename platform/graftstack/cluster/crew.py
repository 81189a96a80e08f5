"""A crew of warm processes on a Ray cluster: each holds a runner, and goes through one block of episodes after another.

What the runners are made of, and what the blocks of a step share, lies once on each node however many processes it has,
in Ray's object store, where NumPy arrays are read in place.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graftstack.cluster.blocks import Blocks
from graftstack.cluster.patience import Patience
from graftstack.cluster.process import RunnerProcess
from graftstack.cluster.references import done, last_line, result_of, why_lost
from graftstack.cluster.resources import what_there_is
from graftstack.errors import TrainingError

log = logging.getLogger(__name__)

# How long to wait for a block before others are given a sign of life.
_POLL_S = 1.0

_MEMORY_REMEDY = "use fewer cluster.num_workers, or smaller episodes"


class _CrewProcess(RunnerProcess):
    """The process of a worker; Ray's tools list it by this name."""

    _shared: Sequence[Any] = ()

    def node(self) -> str:
        """Returns the id of the node that it runs on."""
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def go_through(self, method: str, args: Sequence[Any], *shared: Sequence[Any]) -> Any:
        """Calls a method of the runner. What is shared comes with the first block of a step, and holds for the rest."""
        if shared:
            (self._shared,) = shared
        return self.call(method, [*self._shared, *args])


class _Worker:
    """The driver's end of a process."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.node = process.node.remote()
        """A reference to the node's id."""
        self.has_started = False
        self._step = 0
        self._places: list[int] = []
        self._likes: Iterator[int] = iter(())

    def check(self) -> Any:
        """Returns a reference to nothing, which is there once the process is ready."""
        return self.process.ready.remote()

    def start(self, blocks: Blocks) -> tuple[int, Any]:
        """Begins a block: of those that wait one that it had in the step before, and so may have kept something of.

        Returns:
            Its place, and a reference to what the runner's method will return.
        """
        shared = []
        if self._step != blocks.step:
            self._step, self._likes, self._places = blocks.step, iter(self._places), []
            shared = [blocks.shared]
        place = blocks.take(self._likes)
        self._places.append(place)
        return place, self.process.go_through.remote(blocks.method, blocks.args_list[place], *shared)


class RayCrew:
    """Processes of the connected Ray cluster; those that it has no room for yet join once it has.

    They begin to start at once, so that their imports overlap with whatever the driver does next; `close` ends them.
    One that is lost is replaced without anybody waiting for that: its block goes to another that is there.

    Args:
        make_runner: Called once in each process. It is pickled: what is large in it should be NumPy arrays, which all
            processes of a node read in one place, and can't write to.
        num_workers: Processes.
        num_cpus: CPUs that each reserves.
        num_gpus: GPUs that each reserves.
        num_threads: Threads of torch in each; None: torch stays as it is, and isn't imported for it.
        max_losses: How many losses are made good, as `num_losses` counts them.
        patience_s: How long a call waits while the cluster has no room for a single process.
        verbose: Whether Ray's own loggers speak in the processes.
    """

    def __init__(
        self,
        make_runner: Callable[[], Any],
        *,
        num_workers: int,
        num_cpus: float,
        num_gpus: float = 0.0,
        num_threads: int | None,
        max_losses: int,
        patience_s: float = 300.0,
        verbose: bool = False,
    ) -> None:
        import ray

        actor = ray.remote(_CrewProcess).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0
        )
        # Put once, for all processes and those that replace them.
        settings = ray.put(make_runner)
        self._start_process: Callable[[], Any] = lambda: actor.remote(settings, num_threads, verbose=verbose)
        self._num_wanted = num_workers
        self._needs = f"{num_cpus:g} CPUs and {num_gpus:g} GPUs"
        self._max_losses = max_losses
        self._patience = Patience(patience_s, f"a worker of {self._needs}")
        self._step = 0
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._idle: deque[_Worker] = deque()
        """The longest waiting first."""
        self._running: dict[Any, tuple[int, _Worker]] = {}
        """With the places of their blocks."""
        self._nodes_of_lost: list[str | None] = []
        """None: unknown."""
        self._why_lost = ""
        self._replace()

    @property
    def num_workers(self) -> int:
        """Processes, those that are still starting included."""
        return len(self._workers)

    @property
    def num_losses(self) -> int:
        """How often a process has been lost so far. Once Ray knows that it was a node, all that it had are one loss."""
        import ray

        if not self._nodes_of_lost:
            return 0
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return len({number if node in alive else node or number for number, node in enumerate(self._nodes_of_lost)})

    @property
    def waiting_for(self) -> str | None:
        """What there must be before any block can go on, for people; None: nothing keeps them waiting."""
        if self._is_anybody_there:
            return None
        if num_placed := self._num_placed:
            return f"{num_placed} of {self.num_workers} workers to start"
        return f"room for a worker, which takes {self._needs}: {what_there_is()}"

    def call(
        self,
        method: str,
        args_list: Sequence[Sequence[Any]],
        *,
        shared: Sequence[Any] = (),
        poll: Callable[[int], None] = lambda _: None,
    ) -> list[Any]:
        """Calls a method of the runners once for each entry of `args_list`, as `Crew.call` has it."""
        import ray

        assert self._workers, "the crew is closed"
        self._step += 1
        try:
            self._replace()
            blocks = Blocks(self._step, method, args_list, ray.put(tuple(shared)) if shared else ())
            self._patience.renew()
            while blocks.are_waiting or self._running:
                self._check_there_is_hope()
                self._deal(blocks)
                self._wait(blocks)
                poll(len(blocks.results))
        except BaseException:
            self.close()
            raise
        return blocks.outcome()

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        import ray

        for each in (self._running, self._starting, self._idle):
            each.clear()
        while self._workers:
            if ray.is_initialized():
                ray.kill(self._workers[-1].process)
            self._workers.pop()

    def _deal(self, blocks: Blocks) -> None:
        while self._idle and blocks.are_waiting:
            worker = self._idle.popleft()
            place, reference = worker.start(blocks)
            self._running[reference] = place, worker

    def _wait(self, blocks: Blocks) -> None:
        for reference in done([*self._running, *self._starting], _POLL_S):
            if reference in self._running:
                self._collect(reference, blocks)
            elif reference in self._starting:
                self._welcome(reference)

    def _collect(self, reference: Any, blocks: Blocks) -> None:
        from ray.exceptions import RayError

        place, worker = self._running.pop(reference)
        try:
            blocks.results[place] = result_of(reference)
        except RayError as error:
            self._lose(worker, error)
            blocks.lose(place, self._why_lost)
            return
        except Exception as error:  # the caller judges it
            blocks.fail(place, error)
        self._idle.append(worker)

    def _welcome(self, reference: Any) -> None:
        from ray.exceptions import RayError

        worker = self._starting.pop(reference)
        try:
            result_of(reference)
        except RayError as error:
            self._lose(worker, error)
        else:
            worker.has_started = True
            self._idle.append(worker)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        import ray
        from ray.exceptions import RayActorError, RayError

        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise TrainingError(
                f"a worker of Ray can't start ({last_line(error)}); install the same packages there"
            ) from error
        self._workers.remove(worker)
        ray.kill(worker.process)
        try:
            node = ray.get(worker.node, timeout=0)
        except (RayError, TimeoutError):  # it was lost on its way there
            node = None
        self._nodes_of_lost.append(node)
        self._why_lost = why_lost(error, memory_remedy=_MEMORY_REMEDY)
        log.warning("lost a worker (%s)", self._why_lost)
        # Others may be gone with it. That isn't the fault of blocks that they would be given next.
        while self._idle:
            other = self._idle.popleft()
            self._starting[other.check()] = other
        self._replace()

    def _replace(self) -> None:
        """Starts as many processes as are missing, as long as losses are made good."""
        while len(self._workers) < self._num_wanted and self.num_losses <= self._max_losses:
            worker = _Worker(self._start_process())
            self._workers.append(worker)
            self._starting[worker.check()] = worker

    @property
    def _is_anybody_there(self) -> bool:
        """Whether there is a process that has made its runner."""
        return any(worker.has_started for worker in self._workers)

    @property
    def _num_placed(self) -> int:
        """How many of those that are starting have a place on a node."""
        return len(done([worker.node for worker in self._starting.values()], 0.0))

    def _check_there_is_hope(self) -> None:
        """Raises `TrainingError` if no process is left, or none has come for too long."""
        if not self._workers:
            num = self.num_losses
            raise TrainingError(
                f"cluster.max_failures={self._max_losses}: no worker is left after {num} losses; raise it, or see to "
                f"what ended the last: {self._why_lost}"
            )
        if self._is_anybody_there or self._num_placed:
            self._patience.renew()
        self._patience.check()
