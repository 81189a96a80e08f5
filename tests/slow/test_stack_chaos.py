"""Stacks of which tasks, nodes and drivers are killed at random moments: nothing finished is done twice, none differs.

On one machine the driver starts its own Ray; a cluster of two nodes outlives its drivers, and loses nodes itself.
"""

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest
from sklearn.datasets import make_classification
from tests.cluster.heads import wait_until

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

TABLE = ("data=parquet", "data.path=table.parquet", "data.label=label")

# Half a second to two a fit, so that kills hit most of them amid their work.
SIX = (
    "base_models=[{GradientBoostingClassifier:{n_estimators:120}},"
    "{GradientBoostingClassifier:{n_estimators:160,max_depth:2,subsample:0.8,name:shallow}},"
    "{GradientBoostingClassifier:{n_estimators:140,max_features:7,name:narrow}},"
    "{ExtraTreesClassifier:{n_estimators:800}},"
    "{RandomForestClassifier:{n_estimators:300}},LogisticRegression]"
)
ABOVE = (
    "levels=[[{GradientBoostingClassifier:{n_estimators:60,name:above}},"
    "{GradientBoostingClassifier:{n_estimators:60,max_depth:4,name:deep}}]]"
)

REFIT = (SIX,)
NUM_REFIT = 6 * (5 + 1)

BAG = (SIX, "mode=bag", ABOVE)
NUM_BAG = 6 * 5 + 2 * 5

# Moments of kills come so long before the end, since much is done while a node comes back.
NUM_AT_END = 10

# What a process is called while it works on a task.
BUSY = "ray::_perform"

# What a driver says of a task that it begins again.
REDONE = "its process or node is gone"


class Driver:
    """A process that makes a stack, and what it says."""

    started: ClassVar[list["subprocess.Popen[bytes]"]] = []

    def __init__(self, runs_dir: Path, name: str, *overrides: str) -> None:
        self.known = entries_of(runs_dir / name)
        self.log = runs_dir / f"{name}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "graftstack", "stack", *overrides, f"name={name}", f"runs_dir={runs_dir}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=runs_dir)
        self.started.append(self.process)

    @property
    def num_redone(self) -> int:
        return self.log.read_text().count(REDONE)

    def check_alive(self) -> None:
        assert self.process.poll() is None, f"it is over before the kill\n{self.log.read_text()}"

    def end(self) -> None:
        assert self.process.wait(400) == 0, self.log.read_text()


class Place(NamedTuple):
    """Where a stack is made."""

    overrides: tuple[str, ...]
    nodes: Any
    """The fixture of that name. None: the driver's own Ray."""

    def raylets(self, driver: Driver) -> list[psutil.Process]:
        """Returns the processes below which those are that work on tasks."""
        found: list[psutil.Process] = self.nodes.raylets if self.nodes else [psutil.Process(driver.process.pid)]
        return found


def busy_below(parent: psutil.Process) -> list[psutil.Process]:
    """The processes below `parent` that work on a task right now."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in parent.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] == [BUSY]:
                    found.append(process)
    return found


def kill_task(place: Place, driver: Driver, draw: random.Random) -> None:
    """Kills a process that works on a task of the stack."""
    num_redone = driver.num_redone
    while True:
        driver.check_alive()
        busy = [process for raylet in place.raylets(driver) for process in busy_below(raylet)]
        if busy:
            draw.choice(busy).kill()
            # The first that a new Ray does is no task: it loads what tasks need, and nobody misses it.
            if place.nodes or is_true_soon(lambda: driver.num_redone > num_redone, timeout_s=3):
                return
        time.sleep(0.01)


def kill_node(place: Place, driver: Driver, draw: random.Random) -> None:
    """Kills all processes of the second node while it works on a task; another comes in its stead after a while."""
    [_, second] = place.raylets(driver)
    while not busy_below(second):
        driver.check_alive()
        time.sleep(0.01)
    place.nodes.lose()
    time.sleep(draw.uniform(0, 2))
    place.nodes.add()


def kill_driver(place: Place, driver: Driver, draw: random.Random) -> None:
    """Kills the process that leads, and waits until nobody works for it any more."""
    driver.check_alive()
    raylets = place.raylets(driver)
    orphans = [process for raylet in raylets for process in busy_below(raylet)]
    driver.process.send_signal(signal.SIGKILL)
    assert driver.process.wait(60) == -signal.SIGKILL
    wait_until(lambda: all(map(is_gone, orphans)))
    if place.nodes:
        wait_until(lambda: not any(map(busy_below, raylets)))


def is_gone(process: psutil.Process) -> bool:
    try:
        # One that was working at the time may end its task and wait for others that never come.
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE or process.cmdline()[:1] != [BUSY]
    except psutil.NoSuchProcess:
        return True


KILLS: dict[str, Callable[[Place, Driver, random.Random], None]] = {
    "task": kill_task,
    "node": kill_node,
    "driver": kill_driver,
}


def is_true_soon(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_true


def entries_of(run: Path) -> dict[str, int]:
    """When each entry of the ledger was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}


def predictions_of(run: Path) -> dict[str, str]:
    """Digests of the predictions in the ledger."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "ledger").glob("*.npz")}


def oof_of(run: Path) -> str:
    return hashlib.sha256((run / "oof.parquet").read_bytes()).hexdigest()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def _no_driver_outlives_its_test() -> Iterator[None]:
    yield
    for process in Driver.started:
        process.kill()
    Driver.started.clear()


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the table, and the stacks that no other may differ from."""
    path = tmp_path_factory.mktemp("runs")
    features, labels = make_classification(1500, 20, n_informative=10, n_classes=3, random_state=0)
    frame = pd.DataFrame(features.astype(np.float32), columns=[f"number{i}" for i in range(20)])
    frame["label"] = np.array(["ant", "bee", "cat"])[labels]
    frame.to_parquet(path / "table.parquet")
    Driver(path, "refit", *TABLE, *REFIT, "cluster=inline").end()
    Driver(path, "bag", *TABLE, *BAG, "cluster=inline").end()
    return path


def kill_and_resume(
    runs_dir: Path, name: str, stack: Sequence[str], place: Place, *, kills: Sequence[str], expected: str, seed: int
) -> None:
    """Kills one after another at random moments while a stack is made, and shows that it ends as if nothing had been.

    Args:
        runs_dir: Where runs lie.
        name: Of the run.
        stack: What is stacked.
        place: Where.
        kills: What is killed, in this order; a driver is started again.
        expected: Name of the run of the same stack that nobody killed.
        seed: Of the moments and the victims.
    """
    draw = random.Random(seed)
    run, unbroken = runs_dir / name, runs_dir / expected
    num_tasks = len(entries_of(unbroken))
    driver = Driver(runs_dir, name, *TABLE, *stack, *place.overrides)
    num_lost = 0
    moments = sorted(draw.sample(range(1, num_tasks - NUM_AT_END), len(kills)))
    for victim, num_entries in zip(kills, moments, strict=True):
        while len(entries_of(run)) < num_entries:
            driver.check_alive()
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.7))
        finished = entries_of(run)
        KILLS[victim](place, driver, draw)
        redone = "" if victim == "driver" else f"; {driver.num_redone} run again since the driver began"
        print(f"{name}: killed a {victim} after {len(finished)} of {num_tasks} tasks{redone}")
        num_lost += victim != "driver"
        assert driver.num_redone <= num_lost, "what wasn't killed ran again"
        if victim == "driver":
            assert find_run(name, str(runs_dir)).manifest.status == "interrupted"
            driver, num_lost = Driver(runs_dir, name, "resume=true"), 0
        assert finished.items() <= entries_of(run).items(), "a finished task ran again"
        assert predictions_of(run).items() <= predictions_of(unbroken).items()
    finished = entries_of(run)
    driver.end()

    assert finished.items() <= entries_of(run).items(), "a finished task ran again"
    assert driver.known.items() <= entries_of(run).items(), "a finished task ran again"
    assert driver.num_redone <= num_lost, "what wasn't killed ran again"
    killed, whole = (find_run(each, str(runs_dir)).manifest for each in (name, expected))
    details = killed.details
    # The last driver found in the ledger what was there when it began, and what a lost process had just stored.
    assert len(driver.known) <= details["num_tasks_known"] <= len(driver.known) + num_lost
    assert details["num_tasks_run"] + details["num_tasks_known"] == num_tasks
    assert killed.metrics == whole.metrics
    assert oof_of(run) == oof_of(unbroken)
    assert predictions_of(run) == predictions_of(unbroken)
    assert files(run) == files(unbroken), "a killed writer's leftovers outlive the run"


def test_the_stacks_are_large_enough_for_kills(runs_dir: Path) -> None:
    assert len(entries_of(runs_dir / "refit")) == NUM_REFIT
    assert len(entries_of(runs_dir / "bag")) == NUM_BAG


def test_ten_kills_of_a_stack_on_two_nodes(runs_dir: Path, nodes: Any) -> None:
    kills = ("task", "node", "driver", "node", "task", "driver", "node", "task", "driver", "task")
    place = Place(nodes.overrides, nodes)
    kill_and_resume(runs_dir, "nodes-refit", REFIT, place, kills=kills, expected="refit", seed=1)
    nodes.assert_clean()


def test_seven_kills_of_a_stack_of_two_levels_on_two_nodes(runs_dir: Path, nodes: Any) -> None:
    kills = ("node", "node", "task", "driver", "node", "driver", "task")
    place = Place(nodes.overrides, nodes)
    kill_and_resume(runs_dir, "nodes-bag", BAG, place, kills=kills, expected="bag", seed=2)
    nodes.assert_clean()


def test_five_kills_of_a_stack_that_starts_its_own_ray(runs_dir: Path) -> None:
    place = Place(("cluster=local", "max_slots=2"), None)
    kills = ("driver", "task", "task", "task", "driver")
    kill_and_resume(runs_dir, "local-refit", REFIT, place, kills=kills, expected="refit", seed=3)
