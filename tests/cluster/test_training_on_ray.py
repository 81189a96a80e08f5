"""Training on Ray Train: several workers, lost workers, lost drivers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.cluster.heads import wait_until

from graftstack.cluster.finetune import launch
from graftstack.config.compose import compose_job
from graftstack.errors import ConfigError, TrainingError
from graftstack.runs import Run, find_run, read_progress
from graftstack.storage import Folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SMALL = ("data=digits", "data.image_size=24", "backbone=conv4", "epochs=3", "batch_size=32", "select=last")
TWO = ("cluster=local", "cluster.num_workers=2", "checkpoint.every_steps=20")


class Silent:
    """A display that shows nothing."""

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def run_job(tmp_path: Path, *overrides: str) -> Run:
    everything = [*SMALL, f"runs_dir={tmp_path}", *overrides]
    return launch("finetune", compose_job("finetune", everything), overrides=everything, display=Silent())


def model_of(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / name / "model" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def step_of(folder: Path) -> int:
    progress = read_progress(Folder(folder))
    return progress["step"] if progress else 0


def training_workers() -> list[psutil.Process]:
    """The worker processes of the embedded Ray that this process started."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if process.name().startswith("ray::RayTrain") or "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_cluster_is_clean() -> None:
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    def left_behind() -> list[str]:
        # Without the address, another Ray that happens to run on this machine may answer.
        alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
        # The coordinator is Ray's own: one for each cluster, made by its first trainer.
        return [actor.class_name for actor in alive if actor.class_name != "_AutoscalingCoordinatorActor"]

    deadline = time.monotonic() + 60
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left_behind() == []
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.mark.usefixtures("embedded_ray")
def test_a_killed_worker_is_replaced_and_the_weights_are_those_of_the_unbroken_run(tmp_path: Path) -> None:
    unbroken = run_job(tmp_path, *TWO, "name=unbroken")
    killed: list[int] = []

    def kill_one_in_mid_epoch() -> None:
        steps_per_epoch = 1437 // 32
        wait_until(lambda: step_of(tmp_path / "broken") > steps_per_epoch + 5)
        victim = training_workers()[-1]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one_in_mid_epoch)
    killer.start()
    broken = run_job(tmp_path, *TWO, "name=broken")
    killer.join()
    assert killed
    assert broken.manifest.metrics == unbroken.manifest.metrics
    assert_same(model_of(tmp_path, "broken"), model_of(tmp_path, "unbroken"))
    assert not list(tmp_path.glob("*/.ray")), "Ray's own records outlive the run"
    assert_cluster_is_clean()


@pytest.mark.usefixtures("embedded_ray")
def test_two_workers_take_the_same_steps_as_one(tmp_path: Path) -> None:
    # Frozen BatchNorm: what trains is then the same function of the same batches on any number of workers.
    common = ("freeze_depth=all", "epochs=2", "class_weights=balanced", "label_smoothing=0.1", "accumulate=2")
    run_job(tmp_path, *common, *TWO, "name=two")
    run_job(tmp_path, *common, "cluster=inline", "name=one")
    two, one = model_of(tmp_path, "two"), model_of(tmp_path, "one")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("embedded_ray")
def test_a_diverging_group_fails_once_and_says_why(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ \(learning rate 1e\+30\)"):
        run_job(tmp_path, *TWO, "name=diverged", "optimizer.lr=1e30", "schedule=constant", "schedule.warmup_fraction=0")
    assert find_run("diverged", str(tmp_path)).manifest.status == "failed"
    assert time.monotonic() - began < 120, "it was tried again"
    assert_cluster_is_clean()


def test_more_workers_than_cpus_are_refused_before_anything_starts(tmp_path: Path) -> None:
    num = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(
        ConfigError, match=rf"cluster.num_workers={num}: needs {num} CPUs and this machine has {num - 1}"
    ):
        run_job(tmp_path / "runs", "cluster=local", f"cluster.num_workers={num}")
    assert not (tmp_path / "runs").exists()


def test_a_killed_driver_is_resumed_by_name_alone_and_an_interrupted_one_says_so(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "graftstack",
        "finetune",
        *SMALL,
        f"runs_dir={tmp_path}",
        "checkpoint.every_steps=7",
    ]

    def start(name: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*command, f"name={name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )

    def resume(name: str) -> None:
        resumed = [*command[:4], f"runs_dir={tmp_path}", f"name={name}", "resume=true"]
        subprocess.run(resumed, check=True, capture_output=True, timeout=120)

    assert start("unbroken").wait(120) == 0
    for kill_signal, status, name in [(signal.SIGKILL, -9, "killed"), (signal.SIGINT, 130, "interrupted")]:
        process = start(name)
        wait_until(lambda name=name: step_of(tmp_path / name) > 50)  # type: ignore[misc]
        process.send_signal(kill_signal)
        assert process.wait(60) == status
        assert find_run(name, str(tmp_path)).manifest.status == "interrupted"
        _, complaint = process.communicate()
        way_back = (
            f"graftstack: interrupted; continue with: graftstack finetune name={name} resume=true runs_dir={tmp_path}"
        )
        assert (way_back in complaint.decode()) == (kill_signal == signal.SIGINT)
        resume(name)
        assert find_run(name, str(tmp_path)).manifest.status == "done"
        assert_same(model_of(tmp_path, name), model_of(tmp_path, "unbroken"))
    assert json.loads((tmp_path / "killed/run.json").read_text())["metrics"]["accuracy"] > 0.9
