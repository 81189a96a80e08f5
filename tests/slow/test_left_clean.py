"""A job leaves its cluster as it found it, however it ends: no actor, no placement group, no file."""

import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def lose_all_workers(work: Any, name: str, driver: Any, nodes: Any) -> None:
    """Kills all processes that work for the run, which are not to be replaced."""

    def workers() -> list[psutil.Process]:
        return list(chain.from_iterable(nodes.titled(work.busy.partition(".")[0])))

    work.wait_until(lambda: work.progress(name) > 0 and len(workers()) == 2, name, driver)
    for process in workers():
        process.kill()


def wait(work: Any, name: str, driver: Any, nodes: Any) -> None:
    """It fails by itself."""


FAILURES = {
    "finetune": (("cluster.num_workers=2", "cluster.max_failures=0"), lose_all_workers),
    "sweep": (("space.lr=[1e30]", "space.freeze_depth=[0,2]"), wait),
    "stack": (("base_models=[GaussianNB,{KNeighborsClassifier:{n_neighbors:1300}}]",), wait),
    "meta": (("cluster.num_workers=2", "cluster.max_failures=0"), lose_all_workers),
}


@pytest.mark.parametrize("job", list(FAILURES))
def test_nothing_is_left_after_success_failure_and_interrupt(
    job: str,
    work_of: Callable[[str], Any],
    start_nodes: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = work_of(job)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the drivers, and of the nodes and their processes
    (tmp_path / "ray").mkdir()  # where Ray says which cluster it began last
    nodes = start_nodes()
    nodes.add()

    def assert_clean(name: str) -> None:
        nodes.assert_clean()
        assert not list((work.folder / name).rglob(".*")), "hidden files outlive the run"
        assert not list(tmp_path.glob("graftstack-*"))

    driver = work.begin("interrupted", *nodes.overrides, *work.on_nodes)
    work.wait_until(lambda: work.progress("interrupted") > 0, "interrupted", driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, work.said("interrupted")
    assert find_run("interrupted", str(work.folder)).manifest.status == "interrupted"
    assert_clean("interrupted")

    overrides, fail = FAILURES[job]
    driver = work.begin("failed", *nodes.overrides, *work.on_nodes, *overrides)
    fail(work, "failed", driver, nodes)
    assert driver.wait(200) == 1, work.said("failed")
    assert find_run("failed", str(work.folder)).manifest.status == "failed"
    assert work.said("failed").splitlines()[-1].startswith("graftstack: "), work.said("failed")
    assert_clean("failed")

    work.end("interrupted", work.resume("interrupted"))
    assert_clean("interrupted")
