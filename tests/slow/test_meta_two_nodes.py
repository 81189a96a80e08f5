"""A meta-training on two nodes that share nothing ends as in one process."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_workers_on_two_nodes_end_as_one_process(lasting_nodes: Any, work_of: Callable[[str], Any]) -> None:
    work, nodes = work_of("meta"), lasting_nodes
    driver = work.begin("two", *nodes.overrides, "cluster.num_workers=2")
    work.wait_until(lambda: nodes.num_titled(work.busy) == [1, 1], "two", driver)
    work.end("two", driver)
    work.assert_as_unbroken("two")
    nodes.assert_clean()


def test_workers_that_fit_on_no_node_are_refused_before_anything_starts(
    lasting_nodes: Any, work_of: Callable[[str], Any]
) -> None:
    work = work_of("meta")
    wide = (*lasting_nodes.overrides, "cluster.cpus_per_worker=2", f"runs_dir={work.folder}", "name=wide")
    words = [sys.executable, "-m", "graftstack", "meta", *work.settings("wide"), *wide]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "the nodes there are hold 0 workers of 2 CPUs" in refused.stderr
    assert not (work.folder / "wide").exists()
