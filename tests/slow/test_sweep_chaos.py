"""A sweep that is killed again and again, at any moment, ends as if nothing had happened, and does nothing twice."""

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from graftstack.runs import find_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = (
    *("data=digits", "data.image_size=24", "backbone=conv4", "epochs=8", "batch_size=32"),
    "cluster.cpus_per_worker=1",  # as many threads everywhere: then sums are the same to the last bit
)
SPACE = ("space.freeze_depth=[0,2,all]", "space.lr=[1e-3,3e-3,1e-2]")
NUM_TRIALS = 9
PLACES = [
    pytest.param(10, ("cluster=inline",), id="in this process"),
    pytest.param(4, ("cluster=local", "max_concurrent_trials=2"), id="in processes", marks=pytest.mark.ray),
]


def start(runs_dir: Path, name: str, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "graftstack", "sweep", *overrides, f"name={name}", f"runs_dir={runs_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=runs_dir)


def start_or_resume(runs_dir: Path, name: str, *place: str) -> "subprocess.Popen[bytes]":
    """What a person does after a crash: the name is enough, unless the run never began."""
    return start(runs_dir, name, *(["resume=true"] if (runs_dir / name / "run.json").exists() else fresh(name, *place)))


def fresh(name: str, *place: str) -> list[str]:
    """All of the configuration; images and taps of its own, so that a kill may hit the making of either."""
    return [*SMALL, *SPACE, *place, f"data.cache_dir={name}-cache"]


def end(process: "subprocess.Popen[bytes]") -> None:
    _, complaint = process.communicate(timeout=400)
    assert process.returncode == 0, complaint.decode()


def rows_of(folder: Path) -> dict[str, int]:
    """When the row of each finished trial was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def written(*folders: Path) -> frozenset[tuple[str, int]]:
    """Which files there are, and when each was written, in nanoseconds."""
    found = set()
    for path in [path for folder in folders for path in folder.rglob("*")]:
        with suppress(FileNotFoundError):
            if path.is_file():
                found.add((str(path), path.stat().st_mtime_ns))
    return frozenset(found)


def wait_until_it_writes(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    before = written(folder)
    while not written(folder) - before:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)


def trials_of(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    """All that the manifest says of the trials but their times."""
    rows = find_run(name, str(runs_dir)).manifest.results["trials"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def histories_of(folder: Path) -> list[Any]:
    return [json.loads(path.read_text())["history"] for path in sorted((folder / "trials").glob("*.json"))]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the sweep that no other may differ from."""
    path = tmp_path_factory.mktemp("runs")
    end(start(path, "unbroken", *fresh("unbroken", "cluster=inline")))
    return path


@pytest.mark.parametrize(("num_kills", "place"), PLACES)
def test_kills_at_random_moments_change_nothing_and_no_finished_trial_runs_again(
    runs_dir: Path, num_kills: int, place: tuple[str, ...]
) -> None:
    name = f"killed-{num_kills}"
    folder, cache, unbroken = runs_dir / name, runs_dir / f"{name}-cache", runs_dir / "unbroken"
    work_s = sum(row["seconds"] for row in find_run("unbroken", str(runs_dir)).manifest.results["trials"])
    draw = random.Random(7)
    traces, rows = [], rows_of(folder)
    for kill in range(num_kills):
        process = start_or_resume(runs_dir, name, *place)
        if kill % 4 == 0:  # while it starts
            time.sleep(draw.uniform(0, 8))
        elif kill == 1:  # while it makes taps
            wait_until_it_writes(process, cache / "taps")
            time.sleep(draw.uniform(0, 0.2 * work_s))
        else:  # while it trains, so often that it gets on and so early that it can't end
            wait_until_it_writes(process, folder / "trials")
            time.sleep(draw.uniform(0, 1.5 * work_s / num_kills))
        if kill == num_kills - 1:
            while not rows_of(folder):
                time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1].decode()
        process.kill()
        process.communicate()
        assert rows.items() <= rows_of(folder).items(), "a finished trial ran again"
        rows = rows_of(folder)
        traces.append(written(folder, cache))
    assert 0 < len(rows) < NUM_TRIALS, "the kills came too late"
    assert len(set(traces)) > num_kills / 2, "the kills hit the same moment"
    assert find_run(name, str(runs_dir)).manifest.status == "interrupted"
    end(start_or_resume(runs_dir, name, *place))

    assert rows.items() <= rows_of(folder).items(), "a finished trial ran again"
    killed, expected = (find_run(run, str(runs_dir)).manifest for run in (name, "unbroken"))
    assert killed.status == "done"
    assert killed.metrics == expected.metrics
    assert killed.details == expected.details
    assert trials_of(runs_dir, name) == trials_of(runs_dir, "unbroken")
    assert histories_of(folder) == histories_of(unbroken)
    for file in ("model/model.safetensors", "metrics.parquet", "val_predictions.parquet"):
        assert (folder / file).read_bytes() == (unbroken / file).read_bytes(), file
    assert files(folder) == files(unbroken), "a killed writer's leftovers outlive the run"
