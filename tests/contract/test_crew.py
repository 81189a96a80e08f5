"""What every `Crew` promises whoever goes through blocks, shown in this process and in processes of a Ray cluster."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from graftstack.cluster.crew import RayCrew
from graftstack.errors import ConfigError, TrainingError
from graftstack.meta.crew import Crew, InlineCrew

NUM_WORKERS = 2
PATIENCE_S = 60
SLOW_S = 3.0
NUM_IMAGES = 20_000_000


class Memory(NamedTuple):
    """Where the memory of an array lies."""

    file: str
    offset: int
    is_writeable: bool


class Counting:
    """A runner that counts what it is asked, in `images` and elsewhere."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self.images = images
        self.num_calls = 0

    def scaled(self, factor: float, numbers: npt.NDArray[np.float64], index: int, seconds: float = 0.0) -> float:
        time.sleep(seconds)
        return factor * float(numbers[index])

    def refuse(self, word: str, seconds: float = 0.0) -> str:
        time.sleep(seconds)
        if word:
            raise KeyError(word)
        return "well"

    def refuse_oddly(self) -> None:
        error = ValueError("oddly")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    def work(self, seconds: float = 0.0) -> int:
        """Returns the process that does it."""
        time.sleep(seconds)
        self.num_calls += 1
        return os.getpid()

    def calls(self, seconds: float) -> tuple[int, int]:
        return self.work(seconds), self.num_calls

    def die_once(self, marker: Path, seconds: float = 0.0) -> tuple[int, int]:
        """Ends its own process, unless one has done that before."""
        time.sleep(seconds)
        if not marker.exists():
            marker.touch()
            self.die()
        return self.calls(0.0)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PATIENCE_S)

    def memory(self, shared: npt.NDArray[np.float64], seconds: float) -> tuple[int, Memory, Memory]:
        time.sleep(seconds)
        return os.getpid(), memory_of(self.images), memory_of(shared)

    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()


def memory_of(array: npt.NDArray[Any]) -> Memory:
    """Looks up which file the array is mapped from; two arrays at the same offset of one are one."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, offset, device, inode, *_ = line.split()
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if begin <= address < end:
            return Memory(f"{device} {inode}", address - begin + int(offset, 16), array.flags.writeable)
    raise AssertionError(f"{address:x} isn't mapped")


def make(images: npt.NDArray[np.uint8], slow: Path | None = None, seconds: float = 0.0) -> Counting:
    """Makes a runner, slowly once `slow` exists."""
    if slow is not None and slow.exists():
        time.sleep(seconds)
    return Counting(images)


def refuse() -> Counting:
    raise ConfigError("data.path=/nowhere: no such file; correct it")


def die() -> Counting:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    return np.arange(NUM_IMAGES, dtype=np.uint8)


@pytest.fixture(scope="module")
def inline_crew(images: npt.NDArray[np.uint8]) -> InlineCrew:
    return InlineCrew(Counting(images))


@pytest.fixture(scope="module")
def on_ray(embedded_ray: None) -> Iterator[None]:
    """Nothing of a crew is left there at the end."""
    from ray import cloudpickle

    # The processes can't import the tests.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert_none_left()


@pytest.fixture(scope="module")
def ray_crew(on_ray: None, images: npt.NDArray[np.uint8]) -> Iterator[RayCrew]:
    """A crew that loses none."""
    crew = RayCrew(partial(make, images), num_workers=NUM_WORKERS, num_cpus=0, num_threads=3, max_losses=0)
    yield crew
    crew.close()


@pytest.fixture(params=["inline_crew", pytest.param("ray_crew", marks=pytest.mark.ray)])
def crew(request: pytest.FixtureRequest) -> Crew:
    found: Crew = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def start(on_ray: None) -> Iterator[Callable[..., RayCrew]]:
    """Starts crews of small runners, which end with the test."""
    crews = []

    def start(make_runner: Callable[[], Any] | None = None, *, max_losses: int = 0, **given: Any) -> RayCrew:
        make_runner = make_runner or partial(make, np.zeros(1, np.uint8))
        settings = {"num_workers": NUM_WORKERS, "num_cpus": 0, "num_threads": None, **given}
        crews.append(RayCrew(make_runner, max_losses=max_losses, **settings))
        return crews[-1]

    yield start
    for crew in crews:
        crew.close()


def num_actors() -> int:
    import ray
    from ray.util.state import list_actors

    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
    return sum(actor.class_name == "_CrewProcess" for actor in alive)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def assert_none_left(num: int = 0) -> None:
    """Nothing is left but `num` processes of other crews."""
    from ray.util import placement_group_table

    wait_until(lambda: num_actors() <= num)
    assert num_actors() == num
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


def pids_of(crew: Crew, num: int = NUM_WORKERS) -> list[int]:
    """The processes of a crew, once all are there."""
    found: list[int] = []

    def are_there() -> bool:
        found[:] = sorted(set(crew.call("work", [[0.05]] * 2 * num)))
        return len(found) == num

    wait_until(are_there)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_results_come_in_the_order_of_the_arguments_whichever_is_done_first(crew: Crew) -> None:
    numbers = np.arange(8.0)
    args_list = [(index, (8 - index) / 100) for index in range(8)]
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert crew.call("scaled", args_list, shared=[0.5, numbers]) == expected


def test_shared_arguments_are_those_of_this_call(crew: Crew) -> None:
    numbers = np.ones(3)
    for factor in (1.0, 2.0, 3.0):
        assert crew.call("scaled", [[0], [1], [2]], shared=(factor, factor * numbers)) == [factor**2] * 3
    assert crew.call("refuse", [[""]] * 3) == ["well"] * 3


def test_no_blocks_have_no_results(crew: Crew) -> None:
    assert crew.call("work", []) == []


def test_the_caller_is_told_how_many_are_done(crew: Crew) -> None:
    told: list[int] = []
    crew.call("work", [[0.01]] * 5, poll=told.append)
    assert told == sorted(told)
    assert told[-1] == 5


def test_a_crew_that_works_waits_for_nothing(crew: Crew) -> None:
    waited_for: list[str | None] = []
    pids_of(crew, crew.num_workers)
    crew.call("work", [[0.01]] * 3, poll=lambda _: waited_for.append(crew.waiting_for))
    assert set(waited_for) == {None}


def test_of_what_runners_raise_the_first_in_order_is_raised_as_itself_and_the_crew_works_on(crew: Crew) -> None:
    with pytest.raises(KeyError) as raised:
        crew.call("refuse", [["", 0.1], ["early", 0.3], ["late", 0.0], ["later", 0.0], ["", PATIENCE_S]])
    assert raised.value.args == ("early",)
    assert crew.call("refuse", [[""]] * 3) == ["well"] * 3


@pytest.mark.ray
def test_what_the_caller_raises_is_raised_and_closed_crews_can_be_closed_again(start: Callable[..., RayCrew]) -> None:
    def full(_: int) -> None:
        raise OSError("no space left")

    for crew in (InlineCrew(Counting(np.zeros(1, np.uint8))), start()):
        with pytest.raises(OSError, match="no space left"):
            crew.call("work", [[0.01]] * 5, poll=full)
        crew.close()
        crew.close()


@pytest.mark.ray
def test_blocks_are_spread_over_workers_that_each_make_a_runner_once(ray_crew: RayCrew) -> None:
    pids = pids_of(ray_crew)
    assert ray_crew.num_workers == NUM_WORKERS
    assert os.getpid() not in pids
    began = time.monotonic()
    calls = ray_crew.call("calls", [[0.2]] * 8)
    assert time.monotonic() - began < 8 * 0.2
    for pid in pids:
        counted = sorted(number for at, number in calls if at == pid)
        assert counted == list(range(counted[0], counted[0] + len(counted))), "it is another runner"
    assert ray_crew.call("num_threads", [[]]) == [3]


@pytest.mark.ray
def test_a_block_goes_to_the_worker_that_had_it_in_the_step_before(ray_crew: RayCrew) -> None:
    pids_of(ray_crew)
    # One has the first block, the other all else, and has waited longer when the next step begins.
    uneven = [[0.25], [0.02], [0.02], [0.02]]
    for _ in range(3):
        first, *others = ray_crew.call("work", uneven)
        assert first not in others
        assert ray_crew.call("work", uneven) == [first, *others]
    assert len(set(ray_crew.call("work", [[0.05]] * 12))) == NUM_WORKERS


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells where memory lies")
def test_images_and_shared_arguments_lie_once_on_a_node_and_cant_be_written_to(ray_crew: RayCrew) -> None:
    pids_of(ray_crew)
    found = ray_crew.call("memory", [[0.1]] * 4, shared=[np.zeros(100_000)])
    assert len({pid for pid, _, _ in found}) == NUM_WORKERS
    images, shared = ({each[place] for each in found} for place in (1, 2))
    for (memory,) in (images, shared):
        assert not memory.is_writeable
        assert not memory.file.endswith(" 0"), "it is a process's own"


@pytest.mark.ray
def test_what_cant_be_sent_back_is_told_and_is_no_loss(ray_crew: RayCrew) -> None:
    with pytest.raises(TrainingError, match=r"what can't be sent from there .ValueError: oddly"):
        ray_crew.call("refuse_oddly", [[]])
    assert len(pids_of(ray_crew)) == NUM_WORKERS
    assert ray_crew.num_losses == 0


@pytest.mark.ray
def test_the_block_of_a_killed_worker_goes_to_a_survivor_and_nobody_waits_for_the_replacement(
    start: Callable[..., RayCrew], tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    crew = start(partial(make, np.zeros(1, np.uint8), slow, SLOW_S), max_losses=3)
    before = pids_of(crew)
    slow.touch()
    began = time.monotonic()
    after = crew.call("die_once", [[tmp_path / "dead"], *[[tmp_path / "dead", 0.5]] * 3])
    seconds = time.monotonic() - began
    (survivor,) = {pid for pid, _ in after}
    assert survivor in before
    numbers = [number for _, number in after]
    assert numbers[0] == min(numbers) + 1, "others came before the lost block"
    assert crew.num_losses == 1
    assert crew.num_workers == NUM_WORKERS
    assert seconds < SLOW_S
    # Meanwhile the replacement has started.
    pids = pids_of(crew)
    assert set(pids) & set(before) == {survivor}


@pytest.mark.ray
def test_workers_lost_between_steps_are_no_fault_of_the_blocks_that_they_would_get(
    start: Callable[..., RayCrew],
) -> None:
    crew = start(num_workers=4, max_losses=9)
    pids_of(crew, 4)
    # The one that is left has waited least: all that are dead come first.
    left, *others = crew.call("work", [[0.4], *[[0.1]] * 3])
    assert len({left, *others}) == 4
    for pid in others:
        kill(pid)
    assert crew.call("work", [[0.05]]) == [left]
    assert crew.num_losses >= 1


@pytest.mark.ray
def test_after_too_many_losses_survivors_go_on_alone_and_then_it_is_over(start: Callable[..., RayCrew]) -> None:
    crew = start(max_losses=1)
    for num_losses, num_left in ((1, 2), (2, 1)):
        kill(pids_of(crew)[0])
        while crew.num_losses < num_losses:
            crew.call("work", [[0.05]] * 4)
        assert crew.num_workers == num_left
    (last,) = pids_of(crew, 1)
    kill(last)
    with pytest.raises(
        TrainingError, match=r"^cluster\.max_failures=1: no worker is left after 3 losses; raise it.*its process ended"
    ):
        crew.call("work", [[]])
    assert crew.num_workers == 0


@pytest.mark.ray
def test_a_block_that_loses_worker_after_worker_is_to_blame(start: Callable[..., RayCrew]) -> None:
    crew = start(max_losses=9, num_workers=3)
    with pytest.raises(
        TrainingError, match=r"^block 1 of 1 lost the worker that went through it 3 times; at last: its"
    ):
        crew.call("die", [[]])
    assert crew.num_workers == 0


@pytest.mark.ray
def test_what_making_a_runner_raises_is_raised_as_itself(start: Callable[..., RayCrew]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=/nowhere"):
        start(refuse).call("work", [[]])


@pytest.mark.ray
def test_runners_that_cant_be_made_for_want_of_a_process_are_not_tried_for_ever(start: Callable[..., RayCrew]) -> None:
    crew = start(die, num_workers=1, max_losses=1)
    with pytest.raises(TrainingError, match=r"^cluster\.max_failures=1: no worker is left after 2 losses"):
        crew.call("work", [[]])


@pytest.mark.ray
def test_where_a_cluster_is_full_a_crew_waits_for_room_and_says_so(start: Callable[..., RayCrew]) -> None:
    import ray

    num_cpus = ray.cluster_resources()["CPU"]
    full = start(num_workers=1, num_cpus=num_cpus)
    pids_of(full, 1)
    crew = start(num_workers=1, num_cpus=1)
    waited_for: list[str | None] = []

    def poll(_: int) -> None:
        waited_for.append(crew.waiting_for)
        if len(waited_for) == 2:
            full.close()

    began = time.monotonic()
    assert len(crew.call("work", [[]], poll=poll)) == 1
    assert time.monotonic() - began > 1.5, "that is more than two signs of life in as many seconds"
    amount = f"{num_cpus:g} CPUs, 0 of them free and 0 GPUs, 0 of them free"
    wanted = "room for a worker, which takes 1 CPUs and 0 GPUs"
    assert waited_for[0] == f"{wanted}: the 1 nodes of the cluster have {amount}"
    assert waited_for[-1] is None


@pytest.mark.ray
def test_where_there_never_is_room_for_a_worker_waiting_ends(start: Callable[..., RayCrew]) -> None:
    crew = start(num_cpus=1000, patience_s=1.5)
    with pytest.raises(
        TrainingError, match=r"^cluster\.max_wait_s=1\.5: no room for a worker of 1000 CPUs.*the cluster have \d+ CPUs"
    ):
        crew.call("work", [[]])
    assert crew.num_workers == 0


@pytest.mark.ray
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_crew_leaves_nothing_running(start: Callable[..., RayCrew]) -> None:
    before = num_actors()
    crew = start()
    wide = start(num_cpus=1000)
    pids = pids_of(crew)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        crew.call("work", [[PATIENCE_S]] * 4)
    for each in (crew, wide):
        each.close()
    assert_none_left(before)
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
