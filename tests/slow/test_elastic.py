"""Two nodes, of which one goes: the group shrinks, and the training is that of the unbroken run."""

from collections.abc import Callable
from typing import Any

import pytest

from graftstack.runs import read_progress
from graftstack.storage import Folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# How often the training is saved, in steps.
EVERY = 10


def step_of(work: Any, name: str) -> int:
    """How far the run says it is."""
    progress = read_progress(Folder(work.folder) / name)
    return int(progress["step"]) if progress else 0


def test_a_group_goes_on_with_one_worker_when_a_node_is_lost(nodes: Any, work_of: Callable[[str], Any]) -> None:
    work, name = work_of("finetune"), "elastic"
    steps_per_epoch = work.total // 6
    workers = ("cluster.num_workers=[1,2]", "cluster.max_failures=5")
    driver = work.begin(name, *nodes.overrides, *workers)
    work.wait_until(lambda: step_of(work, name) > steps_per_epoch + EVERY, name, driver)
    assert nodes.num_titled(work.busy) == [1, 1]
    lost_at = step_of(work, name)
    nodes.lose()
    saved = work.progress(name)
    # A step is told before it is saved, so at most one interval is missing.
    assert lost_at - EVERY <= saved < work.total, "it was done already"
    assert saved % steps_per_epoch, "it was between two epochs"
    work.wait_until(lambda: step_of(work, name) > saved + EVERY, name, driver)
    assert nodes.num_titled(work.busy) == [1]
    work.end(name, driver)
    work.assert_as_unbroken(name)
    nodes.assert_clean()


def test_two_workers_on_two_nodes_train_as_one(nodes: Any, work_of: Callable[[str], Any]) -> None:
    work, name = work_of("finetune"), "two"
    driver = work.begin(name, *nodes.overrides, "cluster.num_workers=2")
    work.wait_until(lambda: step_of(work, name) > 0, name, driver)
    assert nodes.num_titled(work.busy) == [1, 1]
    work.end(name, driver)
    work.assert_as_unbroken(name)
    nodes.assert_clean()
