"""This process, until workers are worth their start: small work is over before any would be ready."""

import ctypes
import queue
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from threading import Event, Thread
from typing import Any

from graftstack.executors.threads import limit_threads
from graftstack.runtime import Call, CallEnd, Executor, InlineExecutor

# Modules that take long to load; workers load those of them that this process has, before they count as ready.
_SLOW_MODULES = ("sklearn.ensemble", "sklearn.linear_model", "pandas", "lightgbm", "xgboost", "skops.io")

# How often to look at two sources of news in turn.
_POLL_S = 0.02

# How long a call in this process may go on after it was told to end: compiled code doesn't hear of it.
_PATIENCE_S = 2.0


def warm(executor: Executor) -> Executor:
    """Returns `executor` once its workers are up and have loaded what this process has loaded that takes long."""
    modules = [name for name in _SLOW_MODULES if name in sys.modules]
    num = executor.num_slots
    for number in range(num):
        executor.submit(Call(f"worker {number}", _load, (modules,)))
    while num:
        num -= len(executor.wait(1.0))
    return executor


def _load(modules: list[str]) -> None:
    for name in modules:
        import_module(name)


class WarmingExecutor:
    """One slot in this process, in a thread of its own, until there are workers; then theirs.

    Workers are started, in the background, when half of the work to come would take longer than their start, or when
    a call has gone on for as long as their start takes. A call that is under way when they are ready ends where it
    began, and takes one of their slots meanwhile. Calls are limited to their threads here too, so that where they ran
    makes no difference to a number.

    Args:
        start: Starts the workers and waits until they are ready. It is called in a thread.
        start_s: How long that takes, with what closing them takes.
    """

    def __init__(self, start: Callable[[], Executor], *, start_s: float) -> None:
        self._start = start
        self._start_s = start_s
        self._left_s: float | None = None
        self._here = _Here()
        self._workers: Executor | None = None
        self._started: queue.SimpleQueue[Executor | BaseException] = queue.SimpleQueue()
        self._starter: Thread | None = None
        self._closed = Event()
        self._shared: list[_Shared] = []
        self._keys_there: set[str] = set()

    @property
    def num_slots(self) -> int:
        """1 until the workers are ready."""
        return 1 if self._workers is None else self._workers.num_slots

    def share(self, value: Any) -> Any:
        """Keeps `value` for this process, and shares it with the workers once there are some.

        Raises:
            TypeError: the workers are ready, and it can't be sent to them.
        """
        shared = _Shared(value)
        if self._workers is not None:
            shared.handle(self._workers)
        self._shared.append(shared)
        return shared

    def submit(self, call: Call) -> None:
        """Begins a call: with the workers, if they are ready."""
        if self._workers is None:
            held = tuple(arg.value if isinstance(arg, _Shared) else arg for arg in call.args)
            self._here.submit(call._replace(args=held))
            return
        workers = self._workers
        handles = tuple(arg.handle(workers) if isinstance(arg, _Shared) else arg for arg in call.args)
        self._keys_there.add(call.key)
        workers.submit(call._replace(args=handles))

    def wait(self, timeout_s: float) -> list[CallEnd]:
        """Returns what has ended since, after at most `timeout_s`; at once when workers are ready.

        Raises:
            Exception: what starting the workers, or sending them what is shared, raised.
            KeyboardInterrupt: a call in this process raised it.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            ended = self._wait_once(remaining_s)
            if ended or self._take_workers() or remaining_s == 0:
                return ended
            if self._left_s != 0 and self._here.seconds > self._start_s:
                self._begin_start()

    def cancel(self, key: str) -> None:
        """Ends a call where it is under way; one in compiled code of this process goes on to its end, unheard."""
        if key in self._keys_there and self._workers is not None:
            self._keys_there.remove(key)
            self._workers.cancel(key)
        else:
            self._here.cancel(key)

    def expect(self, seconds: float) -> None:
        """Starts the workers if half of the seconds of work to come is more than their start takes."""
        self._left_s = seconds
        if seconds / 2 > self._start_s:
            self._begin_start()

    def close(self) -> None:
        """Ends the calls under way and the workers, after their start if need be."""
        self._here.close()
        if self._starter is not None:
            started = self._workers or self._started.get()
            if not isinstance(started, BaseException):
                started.close()
            self._closed.set()
            self._starter.join()
            self._starter = self._workers = None
            self._closed = Event()
        self._shared.clear()
        self._keys_there.clear()

    def _wait_once(self, timeout_s: float) -> list[CallEnd]:
        if self._workers is None:
            # Short, since a start may be due, or over.
            return self._here.wait(min(timeout_s, _POLL_S))
        ended = self._here.wait(0.0 if self._keys_there else timeout_s) if self._here.is_busy else []
        if self._keys_there:
            limit_s = 0.0 if ended else min(timeout_s, _POLL_S) if self._here.is_busy else timeout_s
            there = self._workers.wait(limit_s)
            self._keys_there -= {end.key for end in there}
            ended = ended + there
        elif not ended:
            time.sleep(min(timeout_s, _POLL_S))
        return ended

    def _begin_start(self) -> None:
        if self._starter is None:
            self._starter = Thread(target=self._start_workers, name="start of workers", daemon=True)
            self._starter.start()

    def _start_workers(self) -> None:
        try:
            with ExitStack() as stack:
                workers = self._start()
                stack.callback(workers.close)
                for shared in list(self._shared):
                    shared.handle(workers)
                stack.pop_all()
        except BaseException as error:
            self._started.put(error)
            return
        self._started.put(workers)
        # Processes that Linux is to end with their parent, like Ray's, end with the thread that started them.
        self._closed.wait()

    def _take_workers(self) -> bool:
        """Returns whether workers have become ready."""
        if self._workers is not None or self._started.empty():
            return False
        started = self._started.get()
        if isinstance(started, BaseException):
            self._starter = None
            raise started
        self._workers = started
        return True


class _Shared:
    """Stands for a shared value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._handles: list[Any] = []

    def handle(self, workers: Executor) -> Any:
        """Returns what stands for the value among the workers."""
        if not self._handles:
            self._handles.append(workers.share(self.value))
        return self._handles[0]


class _Here:
    """One slot in a thread of this process, so that the one that waits is free for news from elsewhere."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[CallEnd | BaseException] = queue.SimpleQueue()
        self._thread: Thread | None = None
        self._key: str | None = None
        self._began: float | None = None

    @property
    def is_busy(self) -> bool:
        return self._began is not None

    @property
    def seconds(self) -> float:
        """How long the call under way has taken; 0 if there is none."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def submit(self, call: Call) -> None:
        assert self._began is None, "the only slot is taken"
        if self._thread is None:
            # OpenMP keeps threads for each that calls it, so it is the same one for all calls.
            self._thread = Thread(target=self._serve, name="calls in this process", daemon=True)
            self._thread.start()
        self._key, self._began = call.key, time.monotonic()
        self._calls.put(call)

    def wait(self, timeout_s: float) -> list[CallEnd]:
        if self._began is None:
            time.sleep(timeout_s)
            return []
        try:
            end = self._ended.get(timeout=timeout_s) if timeout_s else self._ended.get_nowait()
        except queue.Empty:
            return []
        self._began = None
        if isinstance(end, BaseException):
            self._thread = None  # it has ended
            raise end
        return [end]

    def cancel(self, key: str) -> None:
        """Interrupts the call of this key, if it is under way."""
        if self.is_busy and key == self._key:
            self.close()

    def close(self) -> None:
        """Interrupts the call under way; one that is in compiled code goes on to its end, unheard."""
        if self._thread is None:
            return
        self._calls.put(None)
        if self.is_busy and self._ended.empty() and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(KeyboardInterrupt)
            )
        self._thread.join(_PATIENCE_S)
        self._thread, self._began = None, None
        self._calls, self._ended = queue.SimpleQueue(), queue.SimpleQueue()

    def _serve(self) -> None:
        calls, ended, here = self._calls, self._ended, InlineExecutor(limit_threads)
        try:
            while (call := calls.get()) is not None:
                here.submit(call)
                [end] = here.wait(0.0)
                ended.put(end)
        except BaseException as error:
            ended.put(error)
