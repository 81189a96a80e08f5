"""A meta-training on two nodes that share nothing: nodes go and come, and it ends as in one process."""

import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_workers_on_two_nodes_end_as_one_process(nodes: Any, meta_runs: Any) -> None:
    driver = meta_runs.start("two", *meta_runs.fresh, *nodes.overrides, "cluster.num_workers=2")
    meta_runs.wait_until(lambda: num_busy(nodes) == [1, 1], "two", driver)
    meta_runs.end("two", driver)
    meta_runs.assert_as_unbroken("two")
    nodes.assert_clean()


def test_a_training_goes_on_without_a_node_that_dies_and_with_one_that_comes(nodes: Any, meta_runs: Any) -> None:
    workers = "cluster.num_workers=[1,3]"  # one more than there is room for
    driver = meta_runs.start("nodes", *meta_runs.fresh, *nodes.overrides, workers)

    def wait_until(*num_each: int, step: int) -> None:
        """Waits until so many work on each node, and so much is saved."""
        meta_runs.wait_until(
            lambda: meta_runs.newest_step("nodes") >= step and num_busy(nodes) == [*num_each], "nodes", driver
        )

    wait_until(1, 1, step=20)
    nodes.lose()
    wait_until(1, step=meta_runs.newest_step("nodes") + 20)
    nodes.add(num_cpus=2)
    wait_until(1, 2, step=meta_runs.newest_step("nodes") + 20)
    meta_runs.end("nodes", driver)
    meta_runs.assert_as_unbroken("nodes")
    nodes.assert_clean()


def test_workers_that_fit_on_no_node_are_refused_before_anything_starts(nodes: Any, meta_runs: Any) -> None:
    wide = (*nodes.overrides, "cluster.cpus_per_worker=2", f"runs_dir={meta_runs.folder}", "name=wide")
    words = [sys.executable, "-m", "graftstack", "meta", *meta_runs.fresh, *wide]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "the nodes there are hold 0 workers of 2 CPUs" in refused.stderr
    assert not (meta_runs.folder / "wide").exists()


def num_busy(nodes: Any) -> list[int]:
    return [len(processes) for processes in nodes.busy]
