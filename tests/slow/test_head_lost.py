"""A cluster that loses its head is gone: the job ends soon, and goes on elsewhere from its run folder."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from graftstack.runs import MANIFEST, find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

# What manifests are left with. A crew's driver asks a process of its cluster for something all the time, and misses it;
# others wait inside Ray for answers that never come, and end as they are.
SAID, LEFT = "failed", "running"

# Seconds within which Ray itself may end such a driver, whose own node is gone too, without a word.
AT_ONCE_S = 2

# How long a driver may take to end, in seconds: Ray would end it then, without a word of ours.
MOST_S = 60


def assert_told(said: str, address: str) -> None:
    """Asserts that the job's own error is the last that is said."""
    last = said.splitlines()[-1]
    assert last.startswith(f"graftstack: cluster.address={address}: the cluster is gone ("), said
    assert last.endswith("); go on in another one with resume=true and its cluster.address"), said


@pytest.mark.parametrize(("job", "stored"), [("finetune", LEFT), ("sweep", LEFT), ("stack", LEFT), ("meta", SAID)])
def test_a_job_whose_head_is_lost_goes_on_in_another_cluster(
    job: str, stored: str, work_of: Callable[[str], Any], start_nodes: Callable[[], Any]
) -> None:
    """`stored`: the status that the manifest is left with."""
    work, name = work_of(job), "headless"
    assert work.progress_of(work.unbroken) == work.total
    nodes = start_nodes()
    nodes.add()
    driver = work.begin(name, *nodes.overrides, *work.on_nodes)
    work.wait_until(lambda: work.progress(name) >= work.total // 4, name, driver)
    address = nodes.address  # nobody knows it any more when the head is gone
    nodes.lose_head()
    lost_at = time.monotonic()
    assert driver.wait(MOST_S) == 1
    took_s = time.monotonic() - lost_at
    print(f"{job}: ended {took_s:.0f} s after its head")
    status = json.loads((work.folder / name / MANIFEST).read_text())["status"]
    is_cut_off = stored == SAID and status == LEFT and took_s < AT_ONCE_S
    assert is_cut_off or status == stored
    if not is_cut_off:
        assert_told(work.said(name).strip(), address)
    assert find_run(name, str(work.folder)).manifest.status == ("interrupted" if status == LEFT else status)
    work.assert_nothing_redone(name)
    progress = work.progress(name)
    assert progress < work.total

    elsewhere = start_nodes()
    elsewhere.add()
    driver = work.resume(name, *elsewhere.overrides)
    work.wait_until(lambda: work.progress(name) > progress, name, driver)
    work.end(name, driver)
    work.assert_as_unbroken(name)
    elsewhere.assert_clean()
