"""A meta-training of which workers, nodes and drivers are killed at random moments ends as if nothing had happened."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import psutil
import pytest

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = ("worker", "node", "driver", "worker", "node", "driver", "driver", "worker", "node", "worker")

# Moments of kills come so long before the end, in steps, since much is done while a node comes back.
NUM_AT_END = 300

WORKERS = ("cluster.num_workers=2", "cluster.max_failures=9")


class Scene(NamedTuple):
    """A run, who leads it, and where it goes on."""

    runs: Any
    """The fixture `meta_runs`."""
    nodes: Any
    """The fixture of that name."""
    name: str
    """Of the run."""
    driver: subprocess.Popen[bytes]
    draw: random.Random

    def wait_until(self, condition: Callable[[], bool]) -> None:
        self.runs.wait_until(condition, self.name, self.driver)

    @property
    def busy(self) -> list[psutil.Process]:
        return list(chain.from_iterable(self.nodes.busy))


def kill_worker(scene: Scene) -> Scene:
    """Kills a process that goes through a block."""

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
    return scene


def kill_node(scene: Scene) -> Scene:
    """Kills the second node while it works; another comes in its stead after a while."""
    scene.wait_until(lambda: [len(processes) for processes in scene.nodes.busy][1:] == [1])
    scene.nodes.lose()
    time.sleep(scene.draw.uniform(0, 2))
    scene.nodes.add()
    return scene


def kill_driver(scene: Scene) -> Scene:
    """Kills the process that leads, waits until nobody works for it any more, and starts another."""
    scene.wait_until(lambda: bool(scene.busy))
    scene.driver.kill()
    assert scene.driver.wait(60) == -signal.SIGKILL
    assert find_run(scene.name, str(scene.runs.folder)).manifest.status == "interrupted"
    deadline = time.monotonic() + 60
    while scene.nodes.num_workers:
        assert time.monotonic() < deadline, "its workers outlive it"
        time.sleep(0.1)
    return scene._replace(driver=scene.runs.start(scene.name, "resume=true"))


KILL: dict[str, Callable[[Scene], Scene]] = {"worker": kill_worker, "node": kill_node, "driver": kill_driver}


@pytest.mark.parametrize("seed", [1])
def test_ten_kills_at_random_moments_change_nothing(nodes: Any, meta_runs: Any, seed: int) -> None:
    draw, name = random.Random(seed), f"killed-{seed}"
    driver = meta_runs.start(name, *meta_runs.fresh, *nodes.overrides, *WORKERS)
    scene = Scene(meta_runs, nodes, name, driver, draw)
    moments = sorted(draw.sample(range(1, meta_runs.NUM_STEPS - NUM_AT_END), len(KILLS)))
    steps = []
    for victim, moment in zip(KILLS, moments, strict=True):
        scene.wait_until(lambda moment=moment: meta_runs.newest_step(name) >= moment)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.2))
        steps.append(meta_runs.newest_step(name))
        scene = KILL[victim](scene)
        print(f"{name}: killed a {victim} after {steps[-1]} of {meta_runs.NUM_STEPS} steps, or a few more")
    assert steps == sorted(steps), "it fell back"
    meta_runs.end(name, scene.driver)
    meta_runs.assert_as_unbroken(name)
    nodes.assert_clean()
