"""When workers are worth their start, what runs meanwhile, and what is known of memory."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from graftstack.errors import ConfigError
from graftstack.executors import ProcessExecutor, WarmingExecutor, limit_threads, processes
from graftstack.executors.shared_file import read_shared, write_shared
from graftstack.machine import available_bytes, is_memory_short, out_of_memory_kills, total_bytes
from graftstack.runtime import THREADS, Call, CallDone, CallEnd, CallFailed, CallLost, Executor, InlineExecutor

PATIENCE_S = 60


class Workers(InlineExecutor):
    """Stands for workers; remembers whether it was closed, and what was shared."""

    num_slots = 3

    def __init__(self) -> None:
        super().__init__()
        self.shared: list[Any] = []
        self.times_closed = 0

    def share(self, value: Any) -> Any:
        self.shared.append(value)
        return value

    def close(self) -> None:
        super().close()
        self.times_closed += 1


def where() -> str:
    return threading.current_thread().name


def wait_for_one(executor: Executor) -> CallEnd:
    deadline = time.monotonic() + PATIENCE_S
    while not (ends := executor.wait(0.1)):
        assert time.monotonic() < deadline, "waited in vain"
    return ends[0]


def wait_for_workers(executor: WarmingExecutor) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while executor.num_slots == 1:
        assert time.monotonic() < deadline, "waited in vain"
        assert executor.wait(0.1) == []


def value_of(end: CallEnd) -> Any:
    assert isinstance(end, CallDone), end
    return end.value


def never() -> Executor:
    raise AssertionError("workers are started")


def call(function: Callable[..., Any], *args: Any) -> Call:
    return Call("one", function, args)


def test_small_work_stays_in_this_process() -> None:
    executor = WarmingExecutor(never, start_s=5.0)
    shared = executor.share(np.ones(3))
    for _ in range(5):
        executor.expect(9.0)
        executor.submit(call(np.sum, shared))
        assert value_of(wait_for_one(executor)) == 3.0
    assert executor.num_slots == 1
    executor.close()


def test_workers_are_started_when_the_work_to_come_is_worth_it_and_get_what_is_shared() -> None:
    workers = Workers()
    executor = WarmingExecutor(lambda: workers, start_s=5.0)
    executor.share("before")
    executor.expect(10.5)
    wait_for_workers(executor)
    after = executor.share("after")
    executor.submit(call(str.upper, after))
    assert value_of(wait_for_one(executor)) == "AFTER"
    assert workers.shared == ["before", "after"]
    executor.submit(call(where))
    assert value_of(wait_for_one(executor)) == "MainThread"
    executor.close()
    assert workers.times_closed == 1


@pytest.mark.parametrize(("left_s", "num_slots"), [(None, 3), (1.0, 3), (0.0, 1)])
def test_a_long_call_starts_workers_unless_it_is_the_last(left_s: float | None, num_slots: int) -> None:
    executor = WarmingExecutor(Workers, start_s=0.6)
    if left_s is not None:
        executor.expect(left_s)
    executor.submit(call(time.sleep, 1.5))
    wait_for_one(executor)
    assert executor.num_slots == num_slots
    executor.close()


def test_a_call_under_way_ends_where_it_began_while_workers_take_others() -> None:
    executor = WarmingExecutor(Workers, start_s=0.1)
    go_on = threading.Event()
    executor.submit(Call("here", go_on.wait, (PATIENCE_S,)))
    wait_for_workers(executor)
    executor.submit(Call("there", where, ()))
    assert executor.wait(PATIENCE_S) == [CallDone("there", "MainThread")]
    assert executor.wait(0.05) == []
    go_on.set()
    assert wait_for_one(executor) == CallDone("here", value=True)
    executor.close()


def test_what_starting_workers_raises_is_raised_by_waiting() -> None:
    def refuse() -> Executor:
        raise ConfigError("cluster=local: Ray can't start")

    executor = WarmingExecutor(refuse, start_s=0.0)
    executor.expect(1.0)
    with pytest.raises(ConfigError, match="Ray can't start"):
        wait_for_workers(executor)
    executor.close()


def test_workers_that_come_too_late_are_closed() -> None:
    workers, go_on = Workers(), threading.Event()

    def start() -> Executor:
        go_on.wait(PATIENCE_S)
        return workers

    executor = WarmingExecutor(start, start_s=0.0)
    executor.expect(1.0)
    threading.Timer(0.1, go_on.set).start()
    executor.close()
    executor.close()
    assert workers.times_closed == 1


def test_workers_that_cant_be_given_what_is_shared_are_closed() -> None:
    class Refusing(Workers):
        def share(self, value: Any) -> Any:
            raise TypeError("a lock can't be sent to workers")

    workers = Refusing()
    executor = WarmingExecutor(lambda: workers, start_s=0.0)
    executor.share(threading.Lock())
    executor.expect(1.0)
    with pytest.raises(TypeError, match="can't be sent"):
        wait_for_workers(executor)
    assert workers.times_closed == 1
    executor.close()


def test_closing_interrupts_a_call_in_this_process() -> None:
    ended = threading.Event()

    def spin() -> None:
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    executor = WarmingExecutor(never, start_s=1e9)
    executor.submit(call(spin))
    assert executor.wait(0.1) == []
    executor.close()
    assert ended.is_set()
    executor.submit(call(where))
    assert value_of(wait_for_one(executor)) == "calls in this process"
    executor.close()


@pytest.mark.parametrize("make", [InlineExecutor, lambda: WarmingExecutor(never, start_s=1e9)])
def test_an_interrupt_passes_through(make: Callable[[], Executor]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    executor = make()
    executor.submit(call(interrupt))
    with pytest.raises(KeyboardInterrupt):
        wait_for_one(executor)
    executor.submit(call(int, "x"))
    assert isinstance(wait_for_one(executor), CallFailed)
    executor.close()


def test_processes_that_are_warm_are_used_again_at_once() -> None:
    first = ProcessExecutor(2)
    first.submit(call(abs, -1))
    wait_for_one(first)
    first.close()
    second = processes(2)
    assert isinstance(second, ProcessExecutor)
    began = time.monotonic()
    second.submit(call(abs, -1))
    assert value_of(wait_for_one(second)) == 1
    assert time.monotonic() - began < PATIENCE_S
    second.close()


def test_one_slot_needs_no_processes_and_limits_threads_as_they_do() -> None:
    executor = processes(1)
    assert isinstance(executor, InlineExecutor)
    executor.submit(call(THREADS.get))
    assert value_of(wait_for_one(executor)) == 1
    assert THREADS.get() is None


def test_folders_of_processes_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = [sys.executable, "-c", KILLED]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run(program, check=False, capture_output=True, timeout=PATIENCE_S, env=env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = tmp_path.iterdir()
    others = tmp_path / left.name.replace(platform.node(), "elsewhere")
    others.mkdir()
    executor = ProcessExecutor(1)
    executor.share("value")
    assert not left.exists()
    assert others.exists()
    executor.close()


KILLED = """
import os, signal, sys, tempfile
from graftstack.executors import ProcessExecutor
ProcessExecutor(1).share("value")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_out_of_memory_halves_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([0, 1])
    monkeypatch.setattr("graftstack.executors.local.out_of_memory_kills", lambda: next(kills))
    executor = ProcessExecutor(2)
    executor.submit(call(signal.raise_signal, signal.SIGKILL))
    end = wait_for_one(executor)
    assert isinstance(end, CallLost)
    assert end.is_out_of_memory
    assert executor.num_slots == 1
    executor.submit(call(abs, -1))
    assert value_of(wait_for_one(executor)) == 1
    executor.close()


@pytest.mark.parametrize(
    "value",
    [
        {"a": np.arange(5.0), "b": [np.empty((0, 3)), np.array(["x"], dtype=object)]},
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(12)[::2],
        "text",
    ],
)
def test_a_shared_file_holds_what_was_written_and_its_arrays_are_read_in_place(tmp_path: Path, value: Any) -> None:
    write_shared(value, tmp_path / "one")
    found = read_shared(tmp_path / "one")
    (tmp_path / "one").unlink()
    np.testing.assert_equal(found, value)
    if isinstance(value, dict):
        assert not found["a"].flags.writeable
        assert found["a"].ctypes.data % 64 == 0


def test_files_of_shared_values_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    executor = ProcessExecutor(1)
    executor.submit(call(np.sum, executor.share(np.ones(10))))
    assert value_of(wait_for_one(executor)) == 10.0
    assert len(list(tmp_path.iterdir())) == 1
    executor.close()
    assert list(tmp_path.iterdir()) == []


def test_classes_of_a_script_reach_workers() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    executor = ProcessExecutor(1)
    executor.submit(call(value_of, CallDone("", value=Workers())))
    assert type(value_of(wait_for_one(executor))).__name__ == "Workers"
    executor.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_threads_of_torch_are_limited_in_the_block_alone() -> None:
    import torch

    before = torch.get_num_threads()
    with limit_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:   400 kB\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    return tmp_path


def test_memory_is_that_of_the_machine_where_no_container_limits_it(proc: Path, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert total_bytes(proc, tmp_path) == 1000 * 1024
    assert available_bytes(proc, tmp_path) == 400 * 1024
    assert not is_memory_short(proc, tmp_path)
    assert out_of_memory_kills(proc) == 3


@pytest.mark.parametrize(("used", "available", "is_short"), [(150_000, 60_000, False), (199_000, 11_000, True)])
def test_a_container_limits_memory_but_not_by_what_files_fill(
    proc: Path, tmp_path: Path, used: int, available: int, *, is_short: bool
) -> None:
    (tmp_path / "memory.max").write_text("200000\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 6000\nactive_file 4000\n")
    assert total_bytes(proc, tmp_path) == 200_000
    assert available_bytes(proc, tmp_path) == available
    assert is_memory_short(proc, tmp_path) is is_short


def test_memory_that_nobody_tells_of_is_unknown(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
    assert total_bytes(tmp_path, tmp_path) is None
    assert not is_memory_short(tmp_path, tmp_path)
    assert out_of_memory_kills(tmp_path) == 0
