"""What every `Executor` promises, shown in this process, in others of this machine and in those of a Ray cluster."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import sklearn.linear_model  # noqa: F401 - brings BLAS and OpenMP, which are limited where they are loaded

from graftstack.executors import ProcessExecutor, WarmingExecutor, inline, warm
from graftstack.runtime import Call, CallDone, CallEnd, CallFailed, CallLost, Executor, InlineExecutor

NUM_SLOTS = 2
PATIENCE_S = 120

ANYWHERE = ["inline", "cold", "processes", "warmed", pytest.param("ray", marks=pytest.mark.ray)]
IN_WORKERS = ANYWHERE[2:]


class OddError(Exception):
    """Doesn't survive pickling: it is made from two arguments and keeps one."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(left)


class Stubborn:
    """Can't be pickled."""

    def __reduce__(self) -> Any:
        raise ValueError("stays here")


class Thing:
    """Can be read where its text is well."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return read_thing, (self.text,)


def read_thing(text: str) -> Thing:
    if text != "well":
        raise ValueError(text)
    return Thing(text)


def said(thing: Thing) -> str:
    return thing.text


def double(number: float) -> float:
    return 2 * number


def slow(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def fail(message: str) -> None:
    raise KeyError(message)


def fail_oddly() -> None:
    raise OddError("left", "right")


def make_lock() -> Any:
    return threading.Lock()


def take_lock(lock: Any) -> None:
    pass


def die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def meet(folder: Path, name: str, seconds: float) -> int:
    """Returns how many calls were under way at once."""
    (folder / name).touch()
    time.sleep(seconds)
    num = len(list(folder.iterdir()))
    (folder / name).unlink()
    return num


def look(array: np.ndarray) -> tuple[float, bool, bool]:
    """Returns the array's sum, whether it can be written to, and whether its memory is somebody else's."""
    return float(array.sum()), array.flags.writeable, array.flags.owndata


def sum_of_all(first: np.ndarray, number: int, second: np.ndarray) -> float:
    return float(first.sum() + number + second.sum())


def num_threads() -> list[int | None]:
    """Returns the threads of each library, and those that the call may use."""
    from threadpoolctl import threadpool_info

    from graftstack.runtime import THREADS

    return [THREADS.get(), *(library["num_threads"] for library in threadpool_info())]


@pytest.fixture(scope="module", autouse=True)
def _sent_by_value() -> Iterator[None]:
    """Workers can't import the tests."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def start_processes() -> Executor:
    return warm(ProcessExecutor(NUM_SLOTS))


def make(name: str, request: pytest.FixtureRequest) -> Executor:
    if name == "inline":
        return InlineExecutor()
    if name == "limited":
        return inline()
    if name == "processes":
        return ProcessExecutor(NUM_SLOTS)
    if name == "ray":
        request.getfixturevalue("embedded_ray")
        from graftstack.cluster.executor import RayExecutor

        return RayExecutor(NUM_SLOTS)
    warming = WarmingExecutor(start_processes, start_s=1e9 if name == "cold" else 0.0)
    if name == "warmed":
        warming.expect(1.0)
        while warming.num_slots == 1:
            assert warming.wait(1.0) == []
    return warming


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made = make(request.param, request)
    yield made
    made.close()


def wait_for(executor: Executor, num: int) -> list[CallEnd]:
    ends: list[CallEnd] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(ends) < num:
        assert time.monotonic() < deadline, "waited in vain"
        ends += executor.wait(1.0)
    return ends


def run(executor: Executor, *calls: Call) -> dict[str, CallEnd]:
    """Makes all calls, as many at once as there are slots."""
    waiting, running, ends = list(calls), 0, {}
    while waiting or running:
        while waiting and running < executor.num_slots:
            executor.submit(waiting.pop(0))
            running += 1
        for end in wait_for(executor, 1):
            ends[end.key] = end
            running -= 1
    return ends


def one(executor: Executor, function: Any, *args: Any, num_threads: int = 1) -> CallEnd:
    return run(executor, Call("one", function, args, num_threads))["one"]


@pytest.mark.parametrize("executor", ANYWHERE, indirect=True)
def test_each_call_ends_once_with_what_it_returned(executor: Executor) -> None:
    ends = run(executor, *(Call(str(number), double, (number,)) for number in range(9)))
    assert ends == {str(number): CallDone(str(number), 2 * number) for number in range(9)}
    assert executor.wait(0.0) == []


@pytest.mark.parametrize("executor", ANYWHERE, indirect=True)
def test_waiting_for_nothing_ends_in_time(executor: Executor) -> None:
    assert executor.num_slots >= 1
    executor.expect(0.0)
    assert executor.wait(0.05) == []


@pytest.mark.parametrize("executor", ANYWHERE, indirect=True)
def test_what_a_call_raises_is_its_own_failure(executor: Executor) -> None:
    ends = run(executor, Call("bad", fail, ("no such key",)), Call("good", double, (2,)))
    bad = ends["bad"]
    assert isinstance(bad, CallFailed)
    assert type(bad.error) is KeyError
    assert bad.error.args == ("no such key",)
    assert ends["good"] == CallDone("good", 4)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_what_a_worker_raises_says_where(executor: Executor) -> None:
    end = one(executor, fail, "no such key")
    assert isinstance(end, CallFailed)
    assert "in fail" in "".join(end.error.__notes__)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_an_error_that_cant_be_pickled_arrives_as_text(executor: Executor) -> None:
    end = one(executor, fail_oddly)
    assert isinstance(end, CallFailed)
    assert str(end.error) == "OddError: left"
    assert one(executor, double, 1) == CallDone("one", 2)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_what_cant_be_sent_to_a_worker_is_the_failure_of_its_call(executor: Executor) -> None:
    end = one(executor, take_lock, threading.Lock())
    assert isinstance(end, CallFailed)
    assert isinstance(end.error, TypeError)
    assert "the call can't be sent to a worker (cannot pickle '_thread.lock' object); use classes" in str(end.error)
    assert one(executor, double, 1) == CallDone("one", 2)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_what_cant_be_sent_back_is_the_failure_of_its_call(executor: Executor) -> None:
    end = one(executor, make_lock)
    assert isinstance(end, CallFailed)
    assert "can't be sent back from a worker (cannot pickle '_thread.lock' object)" in str(end.error)
    assert one(executor, double, 1) == CallDone("one", 2)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_what_cant_be_shared_is_refused(executor: Executor) -> None:
    with pytest.raises(TypeError, match="a lock can't be sent to workers"):
        executor.share(threading.Lock())
    with pytest.raises(TypeError, match=r"a Stubborn can't be sent to workers \(stays here\)"):
        executor.share(Stubborn())


@pytest.mark.parametrize("executor", ANYWHERE, indirect=True)
def test_shared_values_arrive_as_they_are_wherever_they_stand_among_the_arguments(executor: Executor) -> None:
    ones, twos = executor.share(np.ones(1000)), executor.share(np.full(1000, 2.0))
    assert one(executor, sum_of_all, ones, 7, twos) == CallDone("one", 3007.0)
    assert one(executor, sum_of_all, twos, 7, twos) == CallDone("one", 4007.0)


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_shared_arrays_are_read_in_place(executor: Executor) -> None:
    shared = executor.share(np.ones(1_000_000))
    assert one(executor, look, shared) == CallDone("one", (1e6, False, False))


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_calls_run_side_by_side_in_other_processes_within_the_slots(executor: Executor, tmp_path: Path) -> None:
    assert executor.num_slots == NUM_SLOTS
    run(executor, *(Call(str(number), slow, (0.3,)) for number in range(4)))
    ends = run(executor, *(Call(str(number), meet, (tmp_path, str(number), 0.3)) for number in range(6)))
    assert {end.value for end in ends.values() if isinstance(end, CallDone)} <= {1, 2}
    assert CallDone("0", 2) in ends.values() or CallDone("1", 2) in ends.values()
    assert os.getpid() not in {end.value for end in run(executor, Call("pid", slow, (0.0,))).values()}  # type: ignore[union-attr]


@pytest.mark.parametrize("executor", ["limited", "cold", *IN_WORKERS], indirect=True)
def test_a_call_is_limited_to_its_threads(executor: Executor) -> None:
    for limit in (1, 2, 1):
        end = one(executor, num_threads, num_threads=limit)
        assert isinstance(end, CallDone)
        assert len(end.value) > 1
        assert set(end.value) == {limit}


@pytest.mark.parametrize("how", ["killed", "exited"])
@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_a_worker_that_dies_loses_its_own_call_and_the_others_go_on(executor: Executor, how: str) -> None:
    shared = executor.share(np.ones(1000))
    ends = run(executor, Call("long", slow, (1.5,)), Call("lost", die, (how,)), Call("next", look, (shared,)))
    lost = ends["lost"]
    assert isinstance(lost, CallLost)
    assert not lost.is_out_of_memory
    assert "process" in lost.why
    assert "\n" not in lost.why
    assert isinstance(ends["long"], CallDone)
    assert isinstance(ends["next"], CallDone)
    assert executor.num_slots == NUM_SLOTS


@pytest.mark.parametrize("executor", ["cold", *IN_WORKERS], indirect=True)
def test_nothing_is_heard_of_a_call_that_is_cancelled_and_its_slot_is_free(executor: Executor, tmp_path: Path) -> None:
    shared = executor.share(np.ones(1000))
    executor.submit(Call("long", tell_and_nap, (tmp_path / "pid", PATIENCE_S)))
    while not (tmp_path / "pid").exists():
        assert executor.wait(0.1) == []
    executor.cancel("long")
    executor.cancel("never heard of")
    ends = run(executor, *(Call(str(number), look, (shared,)) for number in range(NUM_SLOTS + 1)))
    assert set(ends) == {str(number) for number in range(NUM_SLOTS + 1)}
    assert all(isinstance(end, CallDone) for end in ends.values())


def test_a_call_that_has_not_begun_in_this_process_can_be_cancelled() -> None:
    executor = InlineExecutor()
    executor.submit(Call("1", double, (1,)))
    executor.cancel("2")
    executor.cancel("1")
    assert executor.wait(0.0) == []


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_a_shared_value_of_a_class_that_workers_cant_import_arrives(executor: Executor) -> None:
    assert one(executor, said, executor.share(Thing("well"))) == CallDone("one", "well")


@pytest.mark.parametrize("executor", IN_WORKERS, indirect=True)
def test_a_shared_value_that_a_worker_cant_read_is_the_failure_of_the_call(executor: Executor) -> None:
    end = one(executor, said, executor.share(Thing("unreadable")))
    assert isinstance(end, CallFailed)
    assert "unreadable" in str(end.error)
    assert one(executor, double, 1) == CallDone("one", 2)


@pytest.mark.parametrize("name", IN_WORKERS)
def test_closing_ends_what_runs_and_leaves_nothing(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    executor = make(name, request)
    executor.share(np.ones(1000))
    before = time.monotonic()
    for number in range(NUM_SLOTS):
        executor.submit(Call(str(number), tell_and_sleep, (tmp_path / str(number), PATIENCE_S)))
    while len(pids := [path.read_text() for path in tmp_path.iterdir() if path.read_text()]) < NUM_SLOTS:
        assert executor.wait(0.1) == []
    executor.close()
    executor.close()
    assert time.monotonic() - before < PATIENCE_S / 2
    deadline = time.monotonic() + PATIENCE_S
    while any(is_running(int(pid)) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tell_and_nap(path: Path, seconds: float) -> None:
    """Sleeps so that an interrupt is heard in between."""
    path.touch()
    for _ in range(int(20 * seconds)):
        time.sleep(0.05)


def tell_and_sleep(path: Path, seconds: float) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(seconds)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", ANYWHERE)
def test_an_executor_can_be_closed_with_calls_that_nobody_waited_for(name: str, request: pytest.FixtureRequest) -> None:
    executor = make(name, request)
    executor.submit(Call("1", double, (1,)))
    executor.close()
    assert executor.wait(0.0) == []
    executor.close()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("processes", "graftstack.executors.local"),
        pytest.param("ray", "graftstack.cluster.executor", marks=pytest.mark.ray),
    ],
)
def test_nothing_more_is_begun_while_memory_is_short(
    name: str, module: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make(name, request)
    assert executor.num_slots == NUM_SLOTS
    monkeypatch.setattr(f"{module}.is_memory_short", lambda: True)
    assert executor.num_slots == 1
    executor.submit(Call("1", slow, (0.1,)))
    executor.submit(Call("2", slow, (0.1,)))
    assert executor.num_slots == NUM_SLOTS
    wait_for(executor, 2)
    assert executor.num_slots == 1
    executor.close()


@pytest.mark.ray
def test_a_call_that_a_machine_of_the_cluster_has_no_memory_for_halves_the_slots(embedded_ray: None) -> None:
    from ray.exceptions import OutOfMemoryError

    from graftstack.cluster.executor import RayExecutor

    executor = RayExecutor(NUM_SLOTS)
    lost = executor._loss_of(Call("big", double, (1,)), OutOfMemoryError("Task was killed due to the node"))
    assert lost == CallLost("big", "its machine ran out of memory, and Ray ended its process", is_out_of_memory=True)
    assert executor.num_slots == 1
    executor.close()
