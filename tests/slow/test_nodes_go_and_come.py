"""A node dies amid each kind of job, and another comes: it is used, nothing finished is redone, nothing differs."""

import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

CASES = [
    # Its two workers can't go on as one: it waits for the second node.
    pytest.param("finetune", ("cluster.num_workers=2",), 1, id="finetune"),
    pytest.param("sweep", (), 2, id="sweep"),
    pytest.param("stack", (), 2, id="stack"),
    pytest.param("meta", ("cluster.num_workers=[1,3]",), 2, id="meta"),  # one more than there is room for at first
]


@pytest.mark.parametrize(("job", "workers", "num_cpus"), CASES)
def test_a_job_goes_on_without_a_node_that_dies_and_with_one_that_comes(
    job: str, workers: tuple[str, ...], num_cpus: int, work_of: Callable[[str], Any], nodes: Any
) -> None:
    """`num_cpus`: of the node that comes."""
    work, name = work_of(job), "nodes"
    assert work.progress_of(work.unbroken) == work.total
    driver = work.begin(name, *nodes.overrides, *workers)

    def wait_until(*num_each: int, more: int) -> None:
        """Waits until so many processes work on each node, and so much more is done."""
        least = work.progress(name) + more
        work.wait_until(
            lambda: work.progress(name) >= least and nodes.num_titled(work.busy) == [*num_each], name, driver
        )

    wait_until(1, 1, more=max(1, work.total // 20))
    lost_at = time.monotonic()
    nodes.lose()
    if job != "finetune":
        wait_until(1, more=1)
        print(f"{job}: went on without the node after {time.monotonic() - lost_at:.1f} s")
    came_at = time.monotonic()
    nodes.add(num_cpus=num_cpus)
    wait_until(1, num_cpus, more=0 if job != "finetune" else 10)
    print(f"{job}: used the node that came after {time.monotonic() - came_at:.1f} s, at {work.progress(name)}")
    work.end(name, driver)
    work.assert_as_unbroken(name)
    nodes.assert_clean()
