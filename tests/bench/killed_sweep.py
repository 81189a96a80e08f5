"""A sweep of many cheap trials whose driver is killed twice, beside the same sweep that nobody kills.

    python -m tests.bench.killed_sweep [--num-trials 1000] [--cluster local] [--epochs 1]

Both run from the command line to the end, on digits in a Parquet file; the killed one is started again with
``resume=true``. It counts the trials that were lost or trained twice, compares all metrics, and prints what the kills
cost in time.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tests.bench.measuring import Table, load_average, timed

from graftstack.config.schema import DataConfig
from graftstack.data.sources import digits
from graftstack.runs import find_run

DATA = "digits.parquet"

# The driver is killed when so much of the trials is over.
_KILLED_AT = (1 / 3, 2 / 3)


def resuming(runs_dir: Path, name: str) -> list[str]:
    """Returns the command that goes on with the sweep."""
    return [sys.executable, "-m", "graftstack", "sweep", f"name={name}", f"runs_dir={runs_dir}", "resume=true"]


def beginning(options: argparse.Namespace, runs_dir: Path, name: str) -> list[str]:
    """Returns the command that begins the sweep."""
    rates = ",".join(f"{1e-4 * 1.005**number:.6g}" for number in range(options.num_trials))
    return [
        *(sys.executable, "-m", "graftstack", "sweep", f"name={name}", f"runs_dir={runs_dir}"),
        *("data=parquet", f"data.path={runs_dir / DATA}", "data.image=image", "data.image_size=24"),
        *("backbone=conv4", f"epochs={options.epochs}", "batch_size=64"),
        *(f"cluster={options.cluster}", "cluster.cpus_per_worker=1", "freeze_depth=3", f"space.lr=[{rates}]"),
        f"data.cache_dir={runs_dir}/{name}-cache",
    ]


def rows_of(folder: Path) -> dict[str, int]:
    """Returns when the row of each finished trial was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def run(command: list[str], log: Path) -> None:
    """Runs a command to its end."""
    with log.open("ab") as out:
        if subprocess.run(command, stdout=out, stderr=out, check=False).returncode:
            raise SystemExit(log.read_text())


def run_killed(options: argparse.Namespace, runs_dir: Path, log: Path) -> int:
    """Runs a sweep whose driver is killed twice; returns how many finished trials were trained again."""
    folder, command, num_again = runs_dir / "killed", beginning(options, runs_dir, "killed"), 0
    finished: dict[str, int] = {}
    for share in _KILLED_AT:
        with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out) as driver:
            while len(rows_of(folder)) < share * options.num_trials:
                if driver.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.05)
            driver.kill()
        now = rows_of(folder)
        num_again += sum(now.get(row) != when for row, when in finished.items())
        finished = now
        command = resuming(runs_dir, "killed")
    run(command, log)
    now = rows_of(folder)
    return num_again + sum(now.get(row) != when for row, when in finished.items())


def trials_of(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    """Returns all that the manifest says of the trials but their times."""
    rows = find_run(name, str(runs_dir)).manifest.results["trials"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def main() -> None:
    """Runs both, and prints what became of the trials and of the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--cluster", default="local", choices=("local", "inline"))
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    table = Table(
        f"{options.num_trials} trials of {options.epochs} epochs, cluster={options.cluster}, {load_average()}"
    )
    with tempfile.TemporaryDirectory() as name:
        runs_dir = Path(name)
        log = runs_dir / "log.txt"
        pq.write_table(digits.read(DataConfig()), runs_dir / DATA)
        unbroken = timed(lambda: run(beginning(options, runs_dir, "unbroken"), log))
        table.row("unbroken", f"{unbroken.seconds:.1f} s")
        killed = timed(lambda: run_killed(options, runs_dir, log))
        table.row("driver killed twice", f"{killed.seconds:.1f} s")
        found, expected = trials_of(runs_dir, "killed"), trials_of(runs_dir, "unbroken")
        table.row("trials lost", str(options.num_trials - len(found)), "target 0")
        table.row("finished trials that were trained again", str(killed.result), "target 0")
        num_other = sum(row != other for row, other in zip(found, expected, strict=False))
        table.row("trials with other metrics", str(num_other), "target 0")
        table.row("time over unbroken", f"{killed.seconds / unbroken.seconds - 1:+.1%}", "target <= +10 %")


if __name__ == "__main__":
    main()
