"""What every `Pool` promises the loop of a sweep, shown in this process and in processes of a Ray cluster."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from graftstack.cluster.group_pool import GroupPool
from graftstack.cluster.pool import RayPool
from graftstack.cluster.slots import RaySlots
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import TapsConfig
from graftstack.errors import ConfigError, StorageFullError, TrainingError
from graftstack.storage import Folder
from graftstack.sweep.drive import KeepAll, Progress, drive
from graftstack.sweep.inline_pool import InlinePool
from graftstack.sweep.ledger import Ledger
from graftstack.sweep.runner import RunnerSettings
from graftstack.sweep.trials import EpochEnd, Event, Pool, Trial, TrialResult, Unit, UnitEnd, UnitLost

NUM_SLOTS = 2
NUM_EPOCHS = 3
PATIENCE_S = 120


class Counting:
    """A runner whose epochs count; in epoch 2 a trial meets what its params say: raises, fills, dies (once) or sleeps.

    `folder` holds the rows, and remembers which trials have died.
    """

    def __init__(self, folder: Path) -> None:
        self.num_units = 0
        self._folder = folder

    def start(self, unit: Unit) -> EpochEnd | UnitEnd:
        self.num_units += 1
        self._unit, self._epoch = unit, 0
        return self.go_on([trial.index for trial in unit.trials])

    def go_on(self, keep: Sequence[int]) -> EpochEnd | UnitEnd:
        is_over = not keep or self._epoch == NUM_EPOCHS
        if is_over:
            return UnitEnd(self._unit, tuple(self._result(trial) for trial in self._unit.trials))
        self._epoch += 1
        for trial in self._unit.trials:
            if self._epoch == 2:
                self._meet(trial)
        return EpochEnd(self._unit, {index: {"epoch": self._epoch, "accuracy": 0.5} for index in keep})

    def _meet(self, trial: Trial) -> None:
        if "raises" in trial.params:
            raise ValueError(f"{trial.params['raises']}\nand more of it")
        if "fills" in trial.params:
            raise StorageFullError("no space left")
        if "dies" in trial.params:
            self.die_once(trial.name)
        time.sleep(trial.params.get("sleeps", 0))

    def _result(self, trial: Trial) -> TrialResult:
        details = {"pid": os.getpid(), "units of this runner": self.num_units}
        result = TrialResult(index=trial.index, params=trial.params, status="done", epochs=self._epoch, details=details)
        Ledger(Folder(self._folder)).write(result)
        return result

    def die_once(self, name: str) -> int:
        """Ends its own process the first time it is asked to."""
        marker = self._folder / f"{name} has died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def divided(self, number: int, divisor: int, seconds: float = 0.0) -> tuple[float, int]:
        time.sleep(seconds)
        return number / divisor, os.getpid()


def refuse() -> Counting:
    raise ConfigError("data.path=/nowhere: no such file; correct it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool-contract")


@pytest.fixture(scope="module")
def inline_pool(folder: Path) -> InlinePool:
    return InlinePool(Counting(folder))


@pytest.fixture(scope="module")
def ray_pool(embedded_ray: None, folder: Path) -> Iterator[RayPool]:
    from ray import cloudpickle

    # The processes can't import the tests.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = RayPool(RaySlots(partial(Counting, folder), num_slots=lambda: NUM_SLOTS, num_cpus=1))
    yield pool
    pool.close()
    assert_only(0)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["inline_pool", pytest.param("ray_pool", marks=pytest.mark.ray)])
def pool(request: pytest.FixtureRequest) -> Pool:
    found: Pool = request.getfixturevalue(request.param)
    return found


def unit(*indices: int, **params: Any) -> Unit:
    return Unit(tuple(Trial(index, params, FinetuneConfig()) for index in indices), None)


def wait_for(pool: Pool, num: int = 1) -> list[Event]:
    """The next `num` events."""
    events: list[Event] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(events) < num:
        assert time.monotonic() < deadline, "waited in vain"
        events += pool.wait(1.0)
    return events


def finish(pool: Pool, num_units: int = 1) -> list[Event]:
    """Lets all epochs go on, and returns the ends of `num_units` units."""
    ends: list[Event] = []
    while len(ends) < num_units:
        for event in wait_for(pool):
            if isinstance(event, EpochEnd):
                pool.go_on(event.unit, list(event.rows))
            else:
                ends.append(event)
    return ends


def wait_until_free(pool: Pool, num: int) -> None:
    """Waits until `num` slots are free, which is all that happens."""
    deadline = time.monotonic() + PATIENCE_S
    while pool.num_free < num:
        assert time.monotonic() < deadline, f"{pool.num_free} of {num} slots are free"
        assert pool.wait(0.2) == []
    assert pool.num_free == num


def num_slots_of(pool: Pool) -> int:
    return NUM_SLOTS if isinstance(pool, RayPool) else 1


def result_of(event: Event) -> TrialResult:
    assert isinstance(event, UnitEnd)
    return event.results[0]


def num_actors() -> int:
    import ray
    from ray.util.state import list_actors

    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
    return sum(actor.class_name == "_Process" for actor in alive)


def assert_only(num: int) -> None:
    """Nothing is left but `num` processes, those of other pools."""
    from ray.util import placement_group_table

    deadline = time.monotonic() + PATIENCE_S
    while num_actors() > num and time.monotonic() < deadline:
        time.sleep(0.2)
    assert num_actors() == num
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


def test_a_unit_waits_after_each_epoch_to_be_told_who_goes_on(pool: Pool) -> None:
    mine = unit(0, 1)
    pool.start(mine)
    for epoch, keep in [(1, [0, 1]), (2, [1]), (3, [1])]:
        (event,) = wait_for(pool)
        assert isinstance(event, EpochEnd)
        assert event.unit == mine
        assert {index: row["epoch"] for index, row in event.rows.items()} == dict.fromkeys(event.rows, epoch)
        assert pool.wait(0.1) == []
        pool.go_on(mine, keep)
        assert list(event.rows) == ([0, 1] if epoch < 3 else [1])
    (end,) = wait_for(pool)
    assert isinstance(end, UnitEnd)
    assert [result.index for result in end.results] == [0, 1]


def test_a_unit_of_which_none_goes_on_ends(pool: Pool) -> None:
    pool.start(unit(0))
    wait_for(pool)
    pool.go_on(unit(0), [])
    assert result_of(*wait_for(pool)).epochs == 1


def test_a_unit_takes_one_slot_until_it_is_over(pool: Pool) -> None:
    num_slots = num_slots_of(pool)
    wait_until_free(pool, num_slots)
    pool.start(unit(0))
    assert pool.num_free == num_slots - 1
    wait_for(pool)
    assert pool.num_free == num_slots - 1
    pool.go_on(unit(0), [])
    wait_for(pool)
    assert pool.num_free == num_slots


def test_where_nothing_runs_nothing_happens(pool: Pool) -> None:
    assert pool.wait(0.1) == []


def test_runners_stay_warm_between_units(pool: Pool) -> None:
    first = [result_of(end) for end in run_alone(pool, unit(0), unit(1), unit(2), unit(3))]
    assert max(result.details["units of this runner"] for result in first) > 1


def run_alone(pool: Pool, *units: Unit) -> list[Event]:
    ends = []
    for each in units:
        pool.start(each)
        ends += finish(pool)
    return ends


def test_what_a_runner_raises_is_the_loss_of_its_unit_and_the_pool_works_on(pool: Pool) -> None:
    (lost, other) = run_alone(pool, unit(0, raises="a fault"), unit(1))
    assert lost == UnitLost(unit(0, raises="a fault"), "a fault")
    assert result_of(other).status == "done"
    wait_until_free(pool, num_slots_of(pool))


def test_a_full_disk_is_nobodys_fault(pool: Pool) -> None:
    pool.start(unit(0, fills=True))
    with pytest.raises(StorageFullError, match="no space left"):
        finish(pool)
    assert [result_of(end).status for end in run_alone(pool, unit(1))] == ["done"]


def test_a_closed_pool_can_be_closed_again(tmp_path: Path) -> None:
    pool = InlinePool(Counting(tmp_path))
    pool.start(unit(0))
    pool.close()
    pool.close()
    assert pool.wait(0) == []


def test_a_group_whose_row_cant_be_written_is_lost(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("a file in the way")
    settings = RunnerSettings(
        trials_folder=f"{tmp_path}/trials", taps=TapsConfig(), cache_dir=str(tmp_path), is_on_gpu=False
    )
    pool = GroupPool(settings, num_slots=lambda: 1, num_cpus=1, verbose=False)
    pool.start(unit(0))
    (lost,) = wait_for(pool)
    assert isinstance(lost, UnitLost)
    assert lost.unit == unit(0)
    assert f"{tmp_path}/trials" in lost.reason
    assert pool.num_free == 1


@pytest.mark.ray
def test_processes_start_by_themselves(ray_pool: RayPool) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while ray_pool.ready() < NUM_SLOTS:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.ray
def test_units_run_side_by_side(ray_pool: RayPool) -> None:
    wait_until_free(ray_pool, NUM_SLOTS)
    for index in range(NUM_SLOTS):
        ray_pool.start(unit(index))
    assert ray_pool.num_free == 0
    pids = {result_of(end).details["pid"] for end in finish(ray_pool, NUM_SLOTS)}
    assert len(pids) == NUM_SLOTS
    assert os.getpid() not in pids


@pytest.mark.ray
def test_a_killed_process_is_replaced(ray_pool: RayPool) -> None:
    mine = unit(20, dies=True)
    ray_pool.start(mine)
    (lost,) = finish(ray_pool)
    assert isinstance(lost, UnitLost)
    assert lost.unit == mine
    assert "process ended" in lost.reason
    assert "max_concurrent_trials" in lost.reason
    assert "\n" not in lost.reason
    assert ray_pool.num_free == 1, "it can't know of more yet"
    assert result_of(*run_alone(ray_pool, mine)).status == "done"
    wait_until_free(ray_pool, NUM_SLOTS)


class Listed:
    """A search that gives everything at once."""

    def __init__(self, *trials: Trial) -> None:
        self._trials = list(trials)

    @property
    def is_exhausted(self) -> bool:
        return not self._trials

    def next(self) -> Trial | None:
        return self._trials.pop(0) if self._trials else None

    def tell(self, result: TrialResult) -> None:
        pass


def drive_all(pool: Pool, rows: Path, tell: Callable[[Progress], None], *trials: Trial) -> list[TrialResult]:
    return drive(
        Listed(*trials),
        pool,
        KeepAll(),
        Ledger(Folder(rows)),
        make_units=lambda given: [Unit((trial,), None) for trial in given],
        trial_of=lambda row: Trial(row.index, row.params, FinetuneConfig()),
        finished={},
        time_limit_s=None,
        max_losses=1,
        tell=tell,
    )


@pytest.mark.ray
def test_a_sweep_survives_killed_processes(ray_pool: RayPool, tmp_path: Path, folder: Path) -> None:
    trials = [Trial(index, {"dies": True} if index in (31, 33) else {}, FinetuneConfig()) for index in range(30, 36)]
    results = drive_all(ray_pool, tmp_path, lambda _: None, *trials)
    assert [(result.index, result.status) for result in results] == [(index, "done") for index in range(30, 36)]
    assert (folder / "00031 has died").exists()
    assert len(Ledger(Folder(tmp_path)).read()) == 6


@pytest.mark.ray
def test_calls_are_spread_over_all_slots_and_answered_in_order(ray_pool: RayPool) -> None:
    told: list[int] = []
    wait_until_free(ray_pool, NUM_SLOTS)
    answers = ray_pool.call("divided", [[number, 2, 0.05] for number in range(12)], poll=told.append)
    assert [value for value, _ in answers] == [number / 2 for number in range(12)]
    assert len({pid for _, pid in answers}) == NUM_SLOTS
    assert told == sorted(told)
    assert told[-1] == 12
    assert ray_pool.call("divided", []) == []


@pytest.mark.ray
def test_a_call_that_raises_ends_the_others_and_frees_their_slots(ray_pool: RayPool) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        ray_pool.call("divided", [[1, 1, 10 * PATIENCE_S], [1, 0, 1.0]])
    assert [value for value, _ in ray_pool.call("divided", [[4, 2], [6, 2], [8, 2]])] == [2, 3, 4]
    wait_until_free(ray_pool, NUM_SLOTS)
    for index in range(NUM_SLOTS):
        ray_pool.start(unit(index))
    assert len(finish(ray_pool, NUM_SLOTS)) == NUM_SLOTS
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.ray
def test_a_call_whose_process_is_killed_is_made_again_but_not_for_ever(ray_pool: RayPool) -> None:
    pids = ray_pool.call("die_once", [["call 1"], ["call 2"], ["call 1"]])
    assert len(pids) == 3
    with pytest.raises(TrainingError, match="lost 3 times; at last: its process ended"):
        ray_pool.call("die", [[]])


@pytest.mark.ray
def test_what_a_call_raises_is_raised(ray_pool: RayPool) -> None:
    with pytest.raises(ZeroDivisionError):
        ray_pool.call("divided", [[1, 0]])
    assert ray_pool.call("divided", [[1, 1]])[0][0] == 1.0


@pytest.mark.ray
@pytest.mark.parametrize("use", [lambda pool: pool.call("divided", [[1, 1]]), lambda pool: run_alone(pool, unit(0))])
def test_what_making_a_runner_raises_is_raised_at_once(ray_pool: RayPool, use: Callable[[RayPool], Any]) -> None:
    pool = RayPool(RaySlots(refuse, num_slots=lambda: 1, num_cpus=0))
    try:
        with pytest.raises(ConfigError, match=r"^data\.path=/nowhere"):
            use(pool)
    finally:
        pool.close()


@pytest.mark.ray
def test_closing_ends_processes_that_work_and_those_that_never_started(ray_pool: RayPool, folder: Path) -> None:
    before = num_actors()
    pool = RayPool(RaySlots(partial(Counting, folder), num_slots=lambda: 2, num_cpus=0, num_threads=1))
    wide = RayPool(RaySlots(partial(Counting, folder), num_slots=lambda: 1, num_cpus=1000))
    pool.start(unit(0, sleeps=PATIENCE_S))
    wait_for(pool)
    pool.go_on(unit(0), [0])
    for each in (pool, wide, pool):
        each.close()
    assert_only(before)
    assert pool.num_free == 0


@pytest.mark.ray
def test_an_interrupted_sweep_ends_its_processes(ray_pool: RayPool, tmp_path: Path) -> None:
    before = num_actors()
    pool = RayPool(RaySlots(partial(Counting, tmp_path), num_slots=lambda: 2, num_cpus=0))

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive_all(pool, tmp_path, interrupt, Trial(0, {}, FinetuneConfig()), Trial(1, {}, FinetuneConfig()))
    assert_only(before)


@pytest.mark.ray
def test_a_pool_grows_with_its_room_once_nobody_is_idle_and_gives_up_what_finds_none(
    ray_pool: RayPool, folder: Path
) -> None:
    room, before = [1], num_actors()
    pool = RayPool(RaySlots(partial(Counting, folder), num_slots=lambda: room[0], num_cpus=0))
    try:
        wait_until_free(pool, 1)
        room[0] = 2
        time.sleep(1)
        pool.wait(0)
        assert num_actors() == before + 1, "one that is idle is enough"
        pool.start(unit(0))
        wait_for(pool)
        wait_until_free(pool, 1)
        room[0] = 1
        pool.start(unit(1))
        wait_for(pool)
        pool.go_on(unit(0), [0])
        pool.go_on(unit(1), [1])
        assert len(finish(pool, 2)) == 2, "one that works, works on"
    finally:
        pool.close()


@pytest.mark.ray
def test_a_unit_waits_for_a_process_but_not_for_ever(ray_pool: RayPool, folder: Path) -> None:
    wide = RayPool(RaySlots(partial(Counting, folder), num_slots=lambda: 2, num_cpus=1000, patience_s=2.0))
    try:
        assert wide.num_free == 1
        wide.start(unit(0))
        assert wide.num_free == 0
        with pytest.raises(TrainingError, match=r"^cluster\.max_wait_s=2: no room for a process of 1000 CPUs.*free"):
            wait_for(wide)
        assert wide.ready() == 0
    finally:
        wide.close()


def die() -> Counting:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.ray
def test_processes_that_end_as_they_start_are_not_replaced_for_ever(ray_pool: RayPool) -> None:
    pool = RayPool(RaySlots(die, num_slots=lambda: 1, num_cpus=0))
    try:
        pool.start(unit(0))
        with pytest.raises(TrainingError, match="5 processes in a row ended as they started; at last: its process"):
            wait_for(pool)
    finally:
        pool.close()
