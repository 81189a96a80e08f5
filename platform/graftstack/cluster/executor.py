"""Calls as tasks of a Ray cluster."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from graftstack.cluster.autoscaler import num_ahead
from graftstack.cluster.references import done, is_out_of_memory
from graftstack.cluster.session import is_connected, quiet_ray, ray_session
from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import TrainingError
from graftstack.executors import WarmingExecutor, inline, warm
from graftstack.executors.messages import pack, perform, unpack
from graftstack.machine import is_memory_short, usable_cpus
from graftstack.reason import reason
from graftstack.runtime import Call, CallEnd, CallFailed, CallLost, Executor

# What starting Ray on this machine, the imports of its workers and ending it all cost.
_START_S = 6.0

# How long what the cluster has is taken for granted.
_LOOK_AGAIN_S = 1.0

# How long after its submission a task may be cancelled: one that is on its way to its worker just then would come back
# to a driver that knows it no more, and Ray ends such a driver.
_SETTLED_S = 1.0

# How long a call that is interrupted may take to end by itself, and its process when it is killed.
_INTERRUPT_S, _END_S = 2.0, 10.0

_OUT_OF_MEMORY = "its machine ran out of memory, and Ray ended its process"


class RayExecutor:
    """Slots on the connected Ray cluster; a call is a task that takes a CPU for each of its threads.

    Ray keeps the processes warm between tasks, and what is shared once in the memory of each node, where tasks read
    it in place. A call for which a machine had no memory halves the slots.

    Args:
        num_slots: No more than these; all CPUs of the cluster by default, as many as it has at the time.
        verbose: Whether Ray's own loggers speak in the processes.
        end_session: Ends the connection to Ray when the executor is closed; with it Ray ends what runs. None: it is
            somebody else's and stays.
    """

    def __init__(
        self, num_slots: int | None = None, *, verbose: bool = False, end_session: Callable[[], None] | None = None
    ) -> None:

        self._granted = num_slots or sys.maxsize
        self._end_session = end_session
        self._task = _task()
        self._is_quiet = not verbose
        self._ended: list[CallEnd] = []
        self._running: dict[Any, Call] = {}
        self._began: dict[Any, float] = {}
        """When the tasks were submitted that are under way, whether or not somebody waits for them."""
        self._interrupted: list[Any] = []
        """Tasks that were told to end; Ray wants their references kept until they have."""
        self._nodes = _Nodes()

    @property
    def num_slots(self) -> int:
        """What the cluster has now of what was granted; no more than are in use while memory is short here."""
        num = min(self._granted, self._nodes.num_cpus)
        if num > 1 and is_memory_short():
            num = min(num, sum(call.num_threads for call in self._running.values()))
        return max(1, num)

    def share(self, value: Any) -> Any:
        """Puts `value` into the object store.

        Raises:
            TypeError: it can't be pickled.
        """
        import ray
        from ray.exceptions import RayError

        try:
            return ray.put(value)
        except RayError:  # of Ray itself, e.g. that the object store is full
            raise
        except Exception as error:  # whatever the pickling of a user's object raises
            raise TypeError(
                f"a {type(value).__name__} can't be sent to workers ({reason(error)}); use an executor in this process"
            ) from error

    def submit(self, call: Call) -> None:
        """Begins a call; Ray lets it wait if the CPUs are taken by others."""
        import ray

        packed = pack(call, lambda arg: isinstance(arg, ray.ObjectRef))
        if isinstance(packed, CallFailed):
            self._ended.append(packed)
            return
        # One that no node has room for would wait for ever.
        num_cpus = max(1, min(call.num_threads, self._granted, self._nodes.most_cpus))
        task = self._task.options(num_cpus=num_cpus)
        reference = task.remote(packed.payload, call.num_threads, self._is_quiet, *packed.handles)
        self._running[reference] = call
        self._began[reference] = time.monotonic()

    def wait(self, timeout_s: float) -> list[CallEnd]:
        """Returns what has ended since, after at most `timeout_s`."""
        if self._ended:
            timeout_s = 0.0
        elif not self._running:
            time.sleep(timeout_s)
        ended, self._ended = self._ended, []
        ended += [self._end_of(reference) for reference in done(list(self._running), timeout_s)]
        self._interrupt([reference for reference in self._began if reference not in self._running])
        self._interrupted = _unfinished(self._interrupted, timeout_s=0.0)
        return ended

    def cancel(self, key: str) -> None:
        """Ends a call that is under way, as soon as it lets itself be ended: the next one waits in Ray until then."""
        self._ended = [end for end in self._ended if end.key != key]
        for reference in [reference for reference, call in self._running.items() if call.key == key]:
            del self._running[reference]

    def expect(self, seconds: float) -> None:
        """Does nothing: Ray starts processes by itself."""

    def close(self) -> None:
        """Ends the calls under way, with their processes where they don't end by themselves, and waits for that."""
        import ray

        self._running, self._ended = {}, []
        if self._end_session is None and ray.is_initialized():
            time.sleep(max(0.0, max(self._began.values(), default=0.0) + _SETTLED_S - time.monotonic()))
            self._interrupt(list(self._began))
            left = _unfinished(self._interrupted, timeout_s=_INTERRUPT_S)
            for reference in left:
                ray.cancel(reference, force=True)
            _unfinished(left, timeout_s=_END_S)
        self._began, self._interrupted = {}, []
        end_session, self._end_session = self._end_session, None
        if end_session is not None:
            end_session()

    def _interrupt(self, references: Sequence[Any]) -> None:
        """Tells those tasks that nobody waits for to end which have settled."""
        import ray

        now = time.monotonic()
        for reference in references:
            if now - self._began[reference] >= _SETTLED_S:
                del self._began[reference]
                self._interrupted.append(reference)
                ray.cancel(reference, force=False)

    def _end_of(self, reference: Any) -> CallEnd:
        import ray
        from ray.exceptions import RayError, RayTaskError

        call = self._running.pop(reference)
        del self._began[reference]
        try:
            return unpack(call.key, ray.get(reference))
        except RayTaskError as error:  # what is ours has not been reached in the worker, e.g. can't be imported
            cause = error.cause if isinstance(error.cause, Exception) else error
            return CallFailed(call.key, TrainingError(f"a worker of Ray can't make calls ({reason(cause)})"))
        except RayError as error:
            return self._loss_of(call, error)

    def _loss_of(self, call: Call, error: Exception) -> CallLost:
        if is_out_of_memory(error):
            self._granted = max(1, min(self._granted, self._nodes.num_cpus) // 2)
            return CallLost(call.key, _OUT_OF_MEMORY, is_out_of_memory=True)
        return CallLost(call.key, f"its process or node is gone ({reason(error)})", is_out_of_memory=False)


class _Nodes:
    """The CPUs of the connected cluster, looked up now and then."""

    def __init__(self) -> None:
        self._looked: float | None = None
        self._cpus: list[int] = []
        self._num_ahead = 0

    @property
    def num_cpus(self) -> int:
        """Of all nodes that are alive, and some of those that an autoscaler brings once calls wait for them."""
        self._look()
        return sum(self._cpus) + self._num_ahead

    @property
    def most_cpus(self) -> int:
        """Of the largest."""
        self._look()
        return max(self._cpus, default=1)

    def _look(self) -> None:
        import ray

        if self._looked is not None and time.monotonic() < self._looked + _LOOK_AGAIN_S:
            return
        self._cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self._num_ahead = num_ahead()
        self._looked = time.monotonic()


def connect(num_slots: int | None = None, *, cluster: ClusterConfig | None = None, verbose: bool = False) -> Executor:
    """Returns an executor on the connected Ray; where there is none, one that connects, and disconnects when closed.

    A Ray on this machine is started once it is worth that; calls run in this process until then, and to their end where
    there is but one slot. A cluster elsewhere is for the caller to connect to (`ray_session`).
    """
    cluster = cluster or ClusterConfig()
    num_slots = cluster.cpus_of(num_slots or sys.maxsize)
    if cluster.kind is ClusterKind.inline:
        return inline()
    if is_connected():
        return RayExecutor(num_slots, verbose=verbose)
    if min(num_slots, usable_cpus()) < 2:
        return inline()
    return WarmingExecutor(partial(_warm, num_slots, cluster, verbose=verbose), start_s=_START_S)


def _warm(num_slots: int | None, cluster: ClusterConfig, *, verbose: bool) -> Executor:
    with ExitStack() as stack:
        stack.enter_context(ray_session(cluster, verbose=verbose))
        executor = RayExecutor(num_slots, verbose=verbose, end_session=stack.pop_all().close)
    return warm(executor)


@cache
def _task() -> Any:
    """Returns `_perform` as a task: one for all executors, since Ray sends each anew to every worker."""
    import ray

    return ray.remote(max_retries=0, retry_exceptions=False)(_perform)


def _unfinished(references: list[Any], *, timeout_s: float) -> list[Any]:
    import ray

    if not references:
        return []
    left: list[Any] = ray.wait(references, num_returns=len(references), timeout=timeout_s)[1]
    return left


def _perform(payload: bytes, num_threads: int, is_quiet: bool, *held: Sequence[Any]) -> bytes:  # noqa: FBT001
    """Makes a packed call in a worker of Ray, which has read what handles stand for."""
    if is_quiet:
        quiet_ray()
    return perform(payload, lambda: held, num_threads)
