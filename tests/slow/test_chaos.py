"""A training that is killed again and again, at any moment, ends as if nothing had happened."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from graftstack.runs import PROGRESS, find_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_KILLS = 10
SMALL = (
    "data=digits",
    "data.image_size=24",
    "backbone=conv4",
    "epochs=12",
    "batch_size=32",
    "cluster=inline",
    "cluster.cpus_per_worker=1",
    "checkpoint.every_steps=5",
)


def start(runs_dir: Path, name: str, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "graftstack", "finetune", *overrides, f"name={name}", f"runs_dir={runs_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=runs_dir)


def start_or_resume(runs_dir: Path, name: str) -> "subprocess.Popen[bytes]":
    """What a person does after a crash: the name is enough, unless the run never began."""
    return start(runs_dir, name, *(["resume=true"] if (runs_dir / name / "run.json").exists() else fresh(name)))


def fresh(name: str) -> list[str]:
    """All of the configuration; a cache of its own, so that a kill may hit the decoding too."""
    return [*SMALL, f"data.cache_dir={name}-cache"]


def last_told(folder: Path) -> int:
    """When the training last said anything, in nanoseconds."""
    try:
        return (folder / PROGRESS).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_until_it_trains(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    before = last_told(folder)
    while last_told(folder) == before:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)


def end(process: "subprocess.Popen[bytes]") -> None:
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint.decode()


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(tmp_path, "unbroken", *fresh("unbroken"))
    wait_until_it_trains(process, tmp_path / "unbroken")
    start_s = time.monotonic() - began
    end(process)
    training_s = time.monotonic() - began - start_s

    draw = random.Random(7)
    steps = []
    for kill in range(NUM_KILLS):
        process = start_or_resume(tmp_path, "killed")
        if kill % 2:  # while it trains, so often that it gets on and so early that it can't end
            wait_until_it_trains(process, tmp_path / "killed")
            time.sleep(draw.uniform(0, training_s / NUM_KILLS))
        else:  # while it starts, or soon after
            time.sleep(draw.uniform(0, 1.1 * start_s))
        assert process.poll() is None, process.communicate()[1].decode()
        process.kill()
        process.communicate()
        steps.append(newest_step(tmp_path / "killed"))
    assert steps == sorted(steps), "it fell back"
    assert 0 < steps[-1] < 12 * (1437 // 32), "the kills hit no training"
    assert len(set(steps)) > 3, "the kills hit the same moment"
    assert find_run("killed", str(tmp_path)).manifest.status == "interrupted"
    end(start_or_resume(tmp_path, "killed"))

    killed, unbroken = (find_run(name, str(tmp_path)).manifest for name in ("killed", "unbroken"))
    assert killed.status == unbroken.status == "done"
    assert killed.metrics == unbroken.metrics
    assert killed.details == unbroken.details
    assert table(tmp_path, "killed", "metrics") == table(tmp_path, "unbroken", "metrics")
    assert table(tmp_path, "killed", "val_predictions") == table(tmp_path, "unbroken", "val_predictions")
    model, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("killed", "unbroken"))
    assert model.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model[name], tensor), name
    assert not list((tmp_path / "killed").rglob(".*")), "a killed writer's leftovers outlive the run"
    assert files(tmp_path / "killed") == files(tmp_path / "unbroken")


def newest_step(folder: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoints/step-*.json")), default=0)


def table(runs_dir: Path, name: str, what: str) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = pq.read_table(runs_dir / name / f"{what}.parquet").to_pylist()
    return rows


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
