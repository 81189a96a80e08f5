"""Jobs on two nodes of which processes, nodes and drivers are killed at random moments end as if nothing had happened.

Ten kills of each kind of job; those of a stack are in ``test_stack_chaos.py``, where more is known of each.
"""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import psutil
import pytest

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = ("worker", "node", "driver", "worker", "node", "driver", "driver", "worker", "node", "worker")


@dataclass
class Scene:
    """A run, who leads it, and where it goes on."""

    work: Any
    """The small job, of the fixture `work_of`."""
    nodes: Any
    """The fixture of that name."""
    name: str
    """Of the run."""
    driver: Any
    """The process that leads."""
    draw: random.Random
    num_killed: int = 0
    """Drivers so far."""

    def wait_until(self, condition: Callable[[], bool]) -> None:
        self.work.wait_until(condition, self.name, self.driver)

    @property
    def busy(self) -> list[psutil.Process]:
        return list(chain.from_iterable(self.nodes.titled(self.work.busy)))


def kill_worker(scene: Scene) -> None:
    """Kills a process that works for the run."""

    def kill_one() -> bool:
        busy = scene.busy
        scene.draw.shuffle(busy)
        for process in busy:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # so that it stays what it is looked at for
                if process in scene.busy:
                    process.kill()
                    return True
                process.resume()
        return False

    scene.wait_until(kill_one)


def kill_node(scene: Scene) -> None:
    """Kills the second node, whatever it does; another comes in its stead after a while."""
    scene.nodes.lose()
    time.sleep(scene.draw.uniform(0, 2))
    scene.nodes.add()


def kill_driver(scene: Scene) -> None:
    """Kills the process that leads, waits until nobody works for it any more, and starts another."""
    scene.wait_until(lambda: bool(scene.busy))
    scene.driver.kill()
    assert scene.driver.wait(60) == -signal.SIGKILL
    assert find_run(scene.name, str(scene.work.folder)).manifest.status == "interrupted"
    scene.num_killed += 1
    scene.nodes.assert_clean(num_killed=scene.num_killed)
    scene.driver = scene.work.resume(scene.name)


KILL: dict[str, Callable[[Scene], None]] = {"worker": kill_worker, "node": kill_node, "driver": kill_driver}


@pytest.mark.parametrize("job", ["finetune", "sweep", "meta"])
def test_ten_kills_at_random_moments_change_nothing(job: str, work_of: Callable[[str], Any], nodes: Any) -> None:
    work, name, draw = work_of(job), "killed", random.Random(1)
    assert work.progress_of(work.unbroken) == work.total
    driver = work.begin(name, *nodes.overrides, *work.on_nodes)
    scene = Scene(work, nodes, name, driver, draw)
    # Much is done while a node comes back.
    moments = sorted(draw.choices(range(1, work.total // 3), k=len(KILLS)))
    seen = []
    for victim, moment in zip(KILLS, moments, strict=True):
        scene.wait_until(lambda moment=moment: work.progress(name) >= moment)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.2))
        seen.append(work.progress(name))
        began = time.monotonic()
        KILL[victim](scene)
        work.assert_nothing_redone(name)
        print(f"{name} {job}: killed a {victim} at {seen[-1]} of {work.total}; {time.monotonic() - began:.0f} s for it")
    assert seen == sorted(seen), "it fell back"
    work.end(name, scene.driver)
    work.assert_as_unbroken(name)
    nodes.assert_clean(num_killed=scene.num_killed)
