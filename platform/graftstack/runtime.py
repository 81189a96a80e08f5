"""What an algorithm sees of the machine or cluster it runs on: a `Worker` if it trains, an `Executor` if it calls."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Worker(Protocol):
    """One of `world_size` processes that train the same model in step.

    A loop written against it doesn't know whether it runs in this process, under Ray Train or inside a trial.
    Every collective (`mean_`, `gather`, `report`) is called equally often, in the same order, by all ranks.
    """

    rank: int
    world_size: int
    device: "torch.device"

    def prepare_model(self, model: "nn.Module") -> "nn.Module":
        """Returns a module whose backward pass averages the gradients of trainable parameters over all ranks."""
        ...

    def mean_(self, tensors: "Iterable[Tensor]") -> None:
        """Replaces each floating-point tensor by its mean over all ranks, in place."""
        ...

    def gather(self, rows: "Tensor") -> "Tensor":
        """Returns the rows of all ranks, in rank order, on the CPU: [num_rows_of_all, ...]."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells the cluster of finished work; a barrier over all ranks."""
        ...


class LocalWorker:
    """The only rank of a training in this process."""

    rank = 0
    world_size = 1

    def __init__(self, device: "torch.device | None" = None) -> None:
        import torch

        self.device = device or torch.device("cpu")

    def prepare_model(self, model: "nn.Module") -> "nn.Module":
        """Returns `model` itself: there is nobody to average with."""
        return model

    def mean_(self, tensors: "Iterable[Tensor]") -> None:
        """Changes nothing: the mean over one rank."""

    def gather(self, rows: "Tensor") -> "Tensor":
        """Returns `rows` on the CPU."""
        return rows.cpu()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Does nothing: no cluster listens."""


class Call(NamedTuple):
    """A function that is to be called once, in some process."""

    key: str
    """Distinct among the calls that are under way."""
    function: Callable[..., Any]
    """At the top level of a module that workers can import. It finds nothing there of the caller's thread, be it
    scikit-learn's configuration or NumPy's error state: what it needs of that goes into `args`."""
    args: tuple[Any, ...]
    """What `Executor.share` returned arrives as what was shared, which is to be read only."""
    num_threads: int = 1
    """Slots that it takes; a worker limits the threads of BLAS, OpenMP and torch to it."""


class CallDone(NamedTuple):
    """A call that returned."""

    key: str
    value: Any


class CallFailed(NamedTuple):
    """A call that raised, or whose function, arguments or value can't be sent between processes."""

    key: str
    error: Exception
    """As it was raised; a note says where, if that was in another process."""


class CallLost(NamedTuple):
    """A call whose process or node is gone, for which it need not be to blame."""

    key: str
    why: str
    is_out_of_memory: bool


CallEnd = CallDone | CallFailed | CallLost


class Executor(Protocol):
    """Slots in which calls run side by side."""

    @property
    def num_slots(self) -> int:
        """How many slots may be in use now, at least 1: nodes come and go, and memory gets short."""
        ...

    def share(self, value: Any) -> Any:
        """Puts `value` where all workers read it without copying; returns what stands for it in `Call.args`."""
        ...

    def submit(self, call: Call) -> None:
        """Begins a call.

        The caller keeps the sum of `num_threads` of the calls under way, each counted as no more than `num_slots`,
        within `num_slots`.
        """
        ...

    def wait(self, timeout_s: float) -> list[CallEnd]:
        """Returns what has ended since, after at most `timeout_s`; empty if nothing has, or if there are new slots."""
        ...

    def cancel(self, key: str) -> None:
        """Ends a call, if it is under way, so that nothing is heard of it and its slots are free."""
        ...

    def expect(self, seconds: float) -> None:
        """Is told now and then how many seconds calls that aren't submitted yet would take in one slot.

        An executor that has yet to start its workers may find that they aren't worth it.
        """
        ...

    def close(self) -> None:
        """Ends everything that runs and leaves nothing behind; may be called twice."""
        ...


THREADS: ContextVar[int | None] = ContextVar("THREADS", default=None)
"""How many threads and processes of its own the call under way may use; None: nobody limits it."""


EXECUTORS = {
    "inline": "graftstack.executors:inline",
    "processes": "graftstack.executors:processes",
    "ray": "graftstack.cluster.executor:connect",
}
"""What makes each executor, for `pkgutil.resolve_name`: none imports the others. Called without arguments it takes what
the machine or cluster has; all but `inline` take a number of slots. All limit calls to their threads, so that numbers
are the same to the bit on each of them, and on any number of slots."""


class InlineExecutor:
    """One slot: this process, in the thread that waits.

    Args:
        limit: What limits a call to a number of threads while it is under way; by default nothing does, and libraries
            use the threads that they would use without an executor. The sums of BLAS depend on that in their last bits.
    """

    num_slots = 1

    def __init__(self, limit: Callable[[int], AbstractContextManager[Any]] = nullcontext) -> None:
        self._limit = limit
        self._call: Call | None = None

    def share(self, value: Any) -> Any:
        """Returns `value` itself."""
        return value

    def submit(self, call: Call) -> None:
        """Begins `call` at the next `wait`."""
        assert self._call is None, "the only slot is taken"
        self._call = call

    def wait(self, timeout_s: float) -> list[CallEnd]:  # noqa: ARG002 - nothing happens elsewhere to be waited for
        """Makes the call, however long that takes. KeyboardInterrupt and SystemExit pass through."""
        if self._call is None:
            return []
        call, self._call = self._call, None
        try:
            with self._limit(call.num_threads):
                return [CallDone(call.key, call.function(*call.args))]
        except Exception as error:  # the caller judges it
            return [CallFailed(call.key, error)]

    def cancel(self, key: str) -> None:
        """Drops the call if it hasn't begun: while it is under way, nobody can cancel it."""
        if self._call is not None and self._call.key == key:
            self._call = None

    def expect(self, seconds: float) -> None:
        """Does nothing: there is nothing to start."""

    def close(self) -> None:
        """Drops a call that hasn't begun."""
        self._call = None
