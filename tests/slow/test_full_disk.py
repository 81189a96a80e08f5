"""A disk that is full when a training saves: it says so, keeps what it had, and goes on once there is room."""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.cli import main
from graftstack.runs import find_run
from graftstack.storage import Folder

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH, NUM_EPOCHS = 10 * 40 // 32, 6
SMALL = (
    "data=digits",
    "data.num_train_per_class=40",
    "data.image_size=16",
    "backbone=conv4",
    f"epochs={NUM_EPOCHS}",
    "batch_size=32",
    "cluster=inline",
    "cluster.cpus_per_worker=1",
    "select=last",
)
# Less than a checkpoint, more than any other file that a run writes.
ROOM_BYTES = 200_000


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """The command line's handler for SIGTERM goes with the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def start(*overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "graftstack", "finetune", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def fill_disk(process: "subprocess.Popen[str]") -> None:
    """From now on no file of the process can grow beyond `ROOM_BYTES`."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))


def newest(folder: Path) -> Checkpoint | None:
    return CheckpointStore(Folder(folder / "checkpoints"), num_to_keep=2).latest()


def assert_failed_for_want_of_room(process: "subprocess.Popen[str]", runs_dir: Path) -> None:
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    *shown, line = complaint.splitlines()
    assert not [other for other in shown if "Traceback" in other or "space" in other]
    assert line.startswith(f"graftstack: {runs_dir}/full/checkpoints/step-")
    assert "no space left" in line
    assert "resume=true" in line
    manifest = find_run("full", str(runs_dir)).manifest
    assert manifest.status == "failed"
    assert manifest.error == line.removeprefix("graftstack: ")
    assert not list((runs_dir / "full").rglob(".*")), "a half-written file takes up the room"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit the files of another process")
def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    where = f"runs_dir={tmp_path}"
    assert main(["finetune", *SMALL, where, "name=unbroken"]) == 0

    training = start(*SMALL, where, "name=full")
    while not list(tmp_path.glob("full/checkpoints/step-*.json")):
        assert training.poll() is None, training.communicate()[1]
        time.sleep(0.002)
    fill_disk(training)
    assert_failed_for_want_of_room(training, tmp_path)
    saved = newest(tmp_path / "full")
    assert saved is not None
    assert STEPS_PER_EPOCH <= saved.step < STEPS_PER_EPOCH * NUM_EPOCHS

    resumed = start(where, "name=full", "resume=true")
    fill_disk(resumed)
    assert_failed_for_want_of_room(resumed, tmp_path)
    still_saved = newest(tmp_path / "full")
    assert still_saved is not None
    assert still_saved.step == saved.step
    assert still_saved.meta == saved.meta
    assert all(torch.equal(still_saved.tensors[name], tensor) for name, tensor in saved.tensors.items())

    assert main(["finetune", where, "name=full", "resume=true"]) == 0
    assert find_run("full", str(tmp_path)).manifest.status == "done"
    model, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("full", "unbroken"))
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())
