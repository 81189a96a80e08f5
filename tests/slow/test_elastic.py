"""Two nodes, of which one goes: the group shrinks, and the training is that of the unbroken run."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from graftstack.checkpoint import Checkpoint, CheckpointStore
from graftstack.runs import find_run, read_progress
from graftstack.storage import Folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

COMMON = (
    "data=digits",
    "data.image_size=24",
    "backbone=conv4",
    "batch_size=8",
    "select=last",
    "cluster.cpus_per_worker=1",
)
NUM_EPOCHS, STEPS_PER_EPOCH = 6, 1437 // 8
# Only the head trains, gently and behind frozen BatchNorm: then any number of workers takes the same steps, up to
# rounding that stays small, and a step that is lost or taken twice shows in the losses.
HEAD = (
    "backbone.weights=run:base",
    "freeze_depth=all",
    "optimizer.head_lr_multiplier=1",
    f"epochs={NUM_EPOCHS}",
    "checkpoint.every_steps=10",
)


class TwoNodes:
    """A cluster of two nodes on this machine, with one CPU each."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "temp_dir": str(folder / "head"),
                "include_dashboard": True,
                "dashboard_port": free_port(),  # the usual one may be another Ray's
            },
        )
        self.second = self.cluster.add_node(num_cpus=1, temp_dir=str(folder / "second"))
        self.cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def lose_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def num_training_workers(self) -> list[int]:
        """How many processes of a worker group each node runs."""
        return [
            sum(is_training_worker(process) for process in children(node)) for node in self.cluster.list_all_nodes()
        ]

    def left_behind(self) -> list[str]:
        """What actors and placement groups are still there."""
        answer = subprocess.run(
            [sys.executable, "-c", _WHAT_IS_LEFT, self.address], check=True, capture_output=True, text=True, timeout=120
        )
        left: list[str] = json.loads(answer.stdout.splitlines()[-1])
        return left


_WHAT_IS_LEFT = """
import json, logging, sys
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

ray.init(address=sys.argv[1], logging_level=logging.ERROR)
alive = [actor.class_name for actor in list_actors(filters=[("state", "!=", "DEAD")])]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
# The coordinator is Ray's own: one for each cluster, made by its first trainer.
print(json.dumps([name for name in alive if name != "_AutoscalingCoordinatorActor"] + groups))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def children(node: Any) -> list[psutil.Process]:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)


def is_training_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Sockets lie in these folders, and the name of a socket is short.
    with tempfile.TemporaryDirectory(prefix="two-nodes-", ignore_cleanup_errors=True) as folder:
        nodes = TwoNodes(Path(folder))
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "graftstack", "finetune", *COMMON, *HEAD, f"runs_dir={runs_dir}", *overrides]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the backbone that all runs begin with, and the run that no other may differ from."""
    path = tmp_path_factory.mktemp("runs")
    base = [sys.executable, "-m", "graftstack", "pretrain", *COMMON, f"runs_dir={path}", "name=base", "epochs=2"]
    for words in ([*base, "cluster=inline"], command(path, "cluster=inline", "name=unbroken")):
        subprocess.run(words, check=True, capture_output=True, timeout=250)
    return path


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def progress_of(runs_dir: Path, name: str) -> dict[str, Any]:
    return read_progress(Folder(runs_dir) / name) or {"step": 0, "epoch": 0}


def last_checkpoint(run: Path) -> Checkpoint:
    checkpoint = CheckpointStore(Folder(run / "checkpoints"), num_to_keep=2).latest()
    assert checkpoint is not None
    return checkpoint


def history_of(runs_dir: Path, name: str) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = pq.read_table(runs_dir / name / "metrics.parquet").to_pylist()
    return rows


def assert_same_training(runs_dir: Path, name: str) -> None:
    """Every step was taken exactly once: the epochs' mean losses, the model and its metrics are the unbroken run's."""
    history, expected = history_of(runs_dir, name), history_of(runs_dir, "unbroken")
    assert [row["epoch"] for row in history] == list(range(1, NUM_EPOCHS + 1))
    for row, other in zip(history, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5), row
    model = load_file(runs_dir / name / "model" / "model.safetensors")
    for tensor_name, tensor in load_file(runs_dir / "unbroken" / "model" / "model.safetensors").items():
        torch.testing.assert_close(model[tensor_name], tensor, rtol=1e-3, atol=1e-4, msg=tensor_name)
    manifest = find_run(name, str(runs_dir)).manifest
    assert manifest.status == "done"
    assert last_checkpoint(runs_dir / name).step == NUM_EPOCHS * STEPS_PER_EPOCH
    assert manifest.metrics["accuracy"] > 0.9
    assert manifest.metrics["accuracy"] == pytest.approx(
        find_run("unbroken", str(runs_dir)).manifest.metrics["accuracy"], abs=0.003
    )


def assert_nothing_is_left(nodes: TwoNodes, runs_dir: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while left := nodes.left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(1)
    assert not any(nodes.num_training_workers())
    assert not list((runs_dir / name).rglob(".*")), "hidden files outlive the run"


def test_a_group_goes_on_with_one_worker_when_a_node_is_lost(two_nodes: TwoNodes, runs_dir: Path) -> None:
    elastic = command(
        runs_dir,
        "cluster=ray",
        f"cluster.address={two_nodes.address}",
        "cluster.num_workers=[1,2]",
        "cluster.max_failures=5",
        "name=elastic",
    )
    with (runs_dir / "elastic.log").open("wb") as log, subprocess.Popen(elastic, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: progress_of(runs_dir, "elastic")["step"] > STEPS_PER_EPOCH + 10, process)
            assert two_nodes.num_training_workers() == [1, 1]
            lost_at = progress_of(runs_dir, "elastic")
            two_nodes.lose_second()
            saved = last_checkpoint(runs_dir / "elastic")
            # A step is told before it is saved, so at most one interval is missing.
            assert lost_at["step"] - 10 <= saved.step < NUM_EPOCHS * STEPS_PER_EPOCH, "it was done already"
            assert saved.step % STEPS_PER_EPOCH, "it was between two epochs"
            wait_until(lambda: progress_of(runs_dir, "elastic")["step"] > saved.step + 10, process)
            assert two_nodes.num_training_workers() == [1]
            assert process.wait(300) == 0, (runs_dir / "elastic.log").read_text()
        finally:
            process.kill()
    assert_same_training(runs_dir, "elastic")
    assert_nothing_is_left(two_nodes, runs_dir, "elastic")


def test_two_workers_on_two_nodes_train_as_one(two_nodes: TwoNodes, runs_dir: Path) -> None:
    two = command(runs_dir, "cluster=ray", f"cluster.address={two_nodes.address}", "cluster.num_workers=2", "name=two")
    with (runs_dir / "two.log").open("wb") as log, subprocess.Popen(two, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: progress_of(runs_dir, "two")["step"] > 0, process)
            assert two_nodes.num_training_workers() == [1, 1]
            assert process.wait(300) == 0, (runs_dir / "two.log").read_text()
        finally:
            process.kill()
    assert_same_training(runs_dir, "two")
    assert_nothing_is_left(two_nodes, runs_dir, "two")
