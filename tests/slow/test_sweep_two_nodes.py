"""A sweep on two nodes that share nothing but a folder: both train, and the trials are those of one process."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def trials_of(work: Any, name: str) -> list[dict[str, Any]]:
    """What the manifest says of the trials."""
    trials: list[dict[str, Any]] = find_run(name, str(work.folder)).manifest.results["trials"]
    return trials


@pytest.mark.parametrize("scheme", ["", "file://", "local://"], ids=["path", "file", "URI"])
def test_a_sweep_on_two_nodes_is_the_one_in_one_process(
    lasting_nodes: Any, work_of: Callable[[str], Any], scheme: str
) -> None:
    work, nodes, name = work_of("sweep"), lasting_nodes, f"two-{scheme.removesuffix('://') or 'path'}"
    taps = work.folder / f"{name}-taps"
    driver = work.begin(name, *nodes.overrides, f"taps.location={scheme}{taps}")
    busy: set[tuple[int, ...]] = set()
    deadline = time.monotonic() + 300
    while driver.poll() is None and time.monotonic() < deadline:
        busy.add(tuple(nodes.num_titled(work.busy)))
        time.sleep(0.1)
    work.end(name, driver)
    assert (1, 1) in busy, "one node did nothing"
    assert list(taps.glob("*/shard-*.arrow")), "the taps lie elsewhere"
    work.assert_as_unbroken(name)
    reuse = find_run(name, str(work.folder)).manifest.results["reuse"]
    assert reuse["backbone_forwards"] == reuse["unique_samples"]
    nodes.assert_clean()


def test_nodes_that_share_no_taps_each_make_what_they_lack(lasting_nodes: Any, work_of: Callable[[str], Any]) -> None:
    work = work_of("sweep")
    driver = work.begin("apart", *lasting_nodes.overrides, "taps.location=null")
    work.end("apart", driver)
    assert work.unbroken.is_dir()
    apart, unbroken = ([row["metrics"] for row in trials_of(work, name)] for name in ("apart", "unbroken"))
    assert apart == unbroken
    reuse = find_run("apart", str(work.folder)).manifest.results["reuse"]
    # The process that leads makes both in one pass, into a cache that no node has; then each node makes its own.
    assert 1 <= reuse["backbone_forwards"] / reuse["unique_samples"] <= 1 + 2 * 2


def test_trials_that_fit_on_no_node_are_refused_before_anything_starts(
    lasting_nodes: Any, work_of: Callable[[str], Any]
) -> None:
    work = work_of("sweep")
    wide = (*lasting_nodes.overrides, f"runs_dir={work.folder}", "name=wide", "cluster.cpus_per_worker=2")
    words = [sys.executable, "-m", "graftstack", "sweep", *work.settings("wide"), *wide]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "the nodes there are hold 0 workers of 2 CPUs" in refused.stderr
    assert not (work.folder / "wide").exists()
