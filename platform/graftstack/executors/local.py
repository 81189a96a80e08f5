"""Processes on this machine, one a slot, that stay warm between calls and between executors.

They are started as joblib's loky starts its own, so scripts need no ``if __name__ == "__main__"``. Loky's pool isn't
used, since it loses all calls under way with any of its processes, and can't tell which of them was to blame.
"""

import atexit
import os
import shutil
import signal
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from graftstack.errors import StorageFullError
from graftstack.executors.messages import Packed, pack, perform, unpack
from graftstack.executors.shared_file import new_folder, read_shared, write_shared
from graftstack.executors.threads import limit_threads
from graftstack.executors.warming import WarmingExecutor, warm
from graftstack.machine import is_memory_short, out_of_memory_kills, usable_cpus
from graftstack.reason import reason
from graftstack.runtime import Call, CallEnd, CallFailed, CallLost, Executor, InlineExecutor

# How long a process stays without work, as long as joblib's.
_IDLE_S = 300.0

# How long a process may take to be gone after it has closed its pipe.
_EXIT_S = 5.0

# What starting processes and their imports cost before they are of use.
_START_S = 1.5

_LOST = "its process ended (exit status {status})"
_OUT_OF_MEMORY = "its machine ran out of memory, and the kernel ended its process"


class _SharedFile(NamedTuple):
    """Stands for a shared value: the file that it was written to."""

    path: str


class _Process:
    """The driver's end of a process."""

    def __init__(self) -> None:
        from joblib.externals.loky.backend import get_context

        context = get_context("loky")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, _IDLE_S))
        self._process.start()
        theirs.close()
        _ALIVE.add(self)

    @property
    def is_alive(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, packed: Packed, num_threads: int) -> None:
        """Begins a call. Raises `OSError` if the process is gone."""
        self.pipe.send((packed.payload, packed.handles, num_threads))

    def exit_status(self) -> int | None:
        """Returns what a process that closed its pipe ended with."""
        self._process.join(_EXIT_S)
        status: int | None = self._process.exitcode
        return status

    def end(self) -> None:
        """Ends the process and those that it started, whatever they do."""
        from joblib.externals.loky.backend.utils import kill_process_tree

        if self.is_alive:
            kill_process_tree(self._process)
        self._process.join()
        self.pipe.close()
        _ALIVE.discard(self)


_ALIVE: set[_Process] = set()
_STOCK: list[_Process] = []
"""Those of closed executors, warm, for the next one."""


def _end_all() -> None:
    while _ALIVE:
        next(iter(_ALIVE)).end()


def _forget() -> None:
    """What a fork inherits belongs to its parent."""
    _ALIVE.clear()
    _STOCK.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget)


def _stocked() -> list[_Process]:
    """Returns the warm processes; lets go of those that have waited for too long."""
    for process in [each for each in _STOCK if not each.is_alive]:
        _STOCK.remove(process)
        process.end()
    return _STOCK


class ProcessExecutor:
    """A process on this machine for each slot.

    All are started at once, or taken warm from an executor that was closed; `close` ends those that are in a call,
    and the others end by themselves minutes later, or with this process. One that dies takes only its own call along.

    Args:
        num_workers: Processes; as many as there are CPUs to use by default.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or usable_cpus()
        self._ended: list[CallEnd] = []
        self._running: dict[Connection, tuple[_Process, Call]] = {}
        self._in_use = 0
        self._kills = out_of_memory_kills()
        self._folder: Path | None = None
        self._num_shared = 0
        stock = _stocked()
        self._idle = [stock.pop() if stock else _Process() for _ in range(self._num_workers)]

    @property
    def num_slots(self) -> int:
        """All processes; no more than are in use while memory is short, and half of them once it has run out."""
        if self._num_workers > 1 and is_memory_short():
            return max(1, min(self._num_workers, self._in_use))
        return self._num_workers

    def share(self, value: Any) -> Any:
        """Writes `value` to a temporary file, of which workers map the arrays into their memory.

        Raises:
            TypeError: it can't be pickled.
            StorageFullError: the temporary folder has no room for it.
        """
        self._folder = self._folder or new_folder()
        self._num_shared += 1
        path = self._folder / str(self._num_shared)
        try:
            write_shared(value, path)
        except OSError as error:
            raise StorageFullError(
                f"{self._folder}: can't be written ({reason(error)}); free some space there, or set TMPDIR"
            ) from error
        except Exception as error:  # whatever the pickling of a user's object raises
            raise TypeError(
                f"a {type(value).__name__} can't be sent to workers ({reason(error)}); use an executor in this process"
            ) from error
        return _SharedFile(str(path))

    def submit(self, call: Call) -> None:
        """Begins a call in a process that is idle."""
        packed = pack(call, lambda arg: isinstance(arg, _SharedFile))
        if isinstance(packed, CallFailed):
            self._ended.append(packed)
            return
        process = self._idle.pop() if self._idle else _Process()
        try:
            process.send(packed, call.num_threads)
        except OSError:  # it ended while it was idle
            process.end()
            process = _Process()
            process.send(packed, call.num_threads)
        self._running[process.pipe] = process, call
        self._in_use += call.num_threads

    def wait(self, timeout_s: float) -> list[CallEnd]:
        """Returns what has ended since, after at most `timeout_s`."""
        if self._ended:
            timeout_s = 0.0
        ready = wait(list(self._running), timeout_s) if self._running else []
        ended, self._ended = self._ended, []
        return ended + [self._end_of(pipe) for pipe in ready if isinstance(pipe, Connection)]

    def cancel(self, key: str) -> None:
        """Ends the process of a call that is under way; the next call that needs one starts another."""
        self._ended = [end for end in self._ended if end.key != key]
        for pipe, (process, call) in list(self._running.items()):
            if call.key == key:
                del self._running[pipe]
                self._in_use -= call.num_threads
                process.end()

    def expect(self, seconds: float) -> None:
        """Does nothing: all processes have been started."""

    def close(self) -> None:
        """Ends the calls under way and removes what is shared."""
        _STOCK.extend(self._idle)
        for process, _ in self._running.values():
            process.end()
        self._idle, self._running, self._ended, self._in_use = [], {}, [], 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _end_of(self, pipe: Connection) -> CallEnd:
        process, call = self._running.pop(pipe)
        self._in_use -= call.num_threads
        try:
            reply = pipe.recv_bytes()
        except (EOFError, OSError):
            return self._loss_of(process, call)
        self._idle.append(process)
        return unpack(call.key, reply)

    def _loss_of(self, process: _Process, call: Call) -> CallLost:
        status = process.exit_status()
        process.end()
        kills, self._kills = self._kills, out_of_memory_kills()
        is_out_of_memory = status == -signal.SIGKILL and self._kills > kills
        if is_out_of_memory:
            self._num_workers = max(1, self._num_workers // 2)
        else:
            self._idle.append(_Process())
        return CallLost(call.key, _OUT_OF_MEMORY if is_out_of_memory else _LOST.format(status=status), is_out_of_memory)


def inline() -> Executor:
    """Returns this process as an executor that limits calls to their threads, as those in other processes do."""
    return InlineExecutor(limit_threads)


def processes(num_slots: int | None = None) -> Executor:
    """Returns an executor on processes of this machine that starts them once they are worth it.

    Processes that are warm already are used at once; where there is but one slot, it is this process.
    """
    num = num_slots or usable_cpus()
    if num < 2:
        return inline()
    if len(_stocked()) >= num:
        return ProcessExecutor(num)
    return WarmingExecutor(partial(_started, num), start_s=_START_S)


def _started(num_workers: int) -> Executor:
    return warm(ProcessExecutor(num_workers))


def _serve(pipe: Connection, idle_s: float) -> None:
    """Makes one call after another, in a worker, until the driver closes its end or leaves it without work."""
    # Ctrl-C reaches every process of a terminal; the driver decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held: dict[str, Any] = {}
    with suppress(EOFError, OSError):
        while pipe.poll(idle_s):
            payload, handles, num_threads = pipe.recv()
            pipe.send_bytes(perform(payload, partial(_held, handles, held), num_threads))


def _held(handles: list[_SharedFile], held: dict[str, Any]) -> list[Any]:
    """Returns what handles stand for, each read once; lets go of what executors that were closed had shared."""
    for path in [path for path in held if not Path(path).exists()]:
        del held[path]
    for path in (handle.path for handle in handles):
        if path not in held:
            held[path] = read_shared(Path(path))
    return [held[handle.path] for handle in handles]
