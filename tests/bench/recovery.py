"""How soon work goes on after SIGKILL of one of its two processes, by kind of job: ``python -m tests.bench.recovery``.

Each job is killed at three moments, in its own Ray on this machine. Two times are taken from each kill on: until more
work is done, and, where the other process goes on meanwhile, until two work again.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from tests.bench.measuring import Table, load_average
from tests.slow.conftest import WORKS, Work, titled

from graftstack.runs import PROGRESS

NUM_KILLS = 3

_LOOK_EVERY_S = 0.05

# Two processes each.
PLACES = {
    "finetune": ("cluster.num_workers=2", "cluster.max_failures=9"),
    "sweep": ("max_concurrent_trials=2",),
    "stack": ("max_slots=2",),
    "meta": ("cluster.num_workers=2", "cluster.max_failures=9"),
}
WORDS = {"finetune": "step", "sweep": "trial", "stack": "task", "meta": "saved step"}


class Recovery(NamedTuple):
    """Seconds after a kill."""

    until_more_s: float
    until_both_s: float | None
    """The same for a group, which goes on as a whole; None: the job was over before."""


def measure(work: Work) -> list[Recovery]:
    """Runs the job on this machine, and kills a process of it again and again."""
    name = "killed"
    driver = work.begin(name, "cluster=local", *PLACES[work.job])

    def is_over() -> bool:
        return driver.poll() is not None

    def busy() -> list[psutil.Process]:
        return [] if is_over() else titled(psutil.Process(driver.pid), work.busy)

    def wait_until(condition: Callable[[], bool]) -> float:
        work.wait_until(condition, name, driver)
        return time.monotonic()

    found = []
    try:
        for kill in range(NUM_KILLS):
            wait_until(lambda kill=kill: work.progress(name) > kill and len(busy()) == 2)  # type: ignore[misc]
            victims = busy()
            before = work.progress(name)
            victims[0].kill()
            began = time.monotonic()
            if work.job == "finetune":
                found.append(Recovery(*[until_a_group_steps(work, name, victims, wait_until) - began] * 2))
                continue
            wait_until(lambda victim=victims[0]: not is_alive(victim))  # type: ignore[misc]
            more_at = both_at = 0.0
            while not more_at or not (both_at or is_over()):
                assert more_at or not is_over(), work.said(name)
                time.sleep(_LOOK_EVERY_S)
                now = time.monotonic()
                more_at = more_at or (now if work.progress(name) > before else 0.0)
                both_at = both_at or (now if len(busy()) == 2 else 0.0)
            found.append(Recovery(more_at - began, both_at - began if both_at else None))
        work.end(name, driver)
    finally:
        driver.kill()
    return found


def until_a_group_steps(
    work: Work, name: str, victims: list[psutil.Process], wait_until: Callable[[Callable[[], bool]], float]
) -> float:
    """Returns when the run first tells of a step after all of its old processes are gone."""
    wait_until(lambda: not any(map(is_alive, victims)))
    file = work.folder / name / PROGRESS
    before = file.stat().st_mtime_ns
    return wait_until(lambda: file.stat().st_mtime_ns > before)


def is_alive(process: psutil.Process) -> bool:
    """Returns whether a process still runs."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Measures the jobs that are asked for, all unless any is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(PLACES)}; default: all")
    jobs = parser.parse_args().jobs or list(PLACES)
    if unknown := set(jobs) - set(PLACES):
        parser.error(f"unknown job {sorted(unknown)[0]}; use {', '.join(PLACES)}")
    table = Table(f"recovery from a killed process, median of {NUM_KILLS} kills, {load_average()}")
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(WORKS[job](Path(folder)))
        rows = {f"until the next {WORDS[job]} is done": [each.until_more_s for each in found]}
        if job != "finetune":
            both = [each.until_both_s for each in found if each.until_both_s is not None]
            rows["until two processes work again"] = both
        for what, seconds in rows.items():
            spread = f"{min(seconds):.1f} .. {max(seconds):.1f}"
            table.row(f"{job}, {what}, s", f"{median(seconds):.1f}", f"target < 60, {spread}")


if __name__ == "__main__":
    main()
