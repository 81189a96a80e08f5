"""What slow tests share: a cluster that loses nodes, and one small job of each kind.

Tests can't import this file; they get what they need from its fixtures.
"""

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from sklearn.datasets import make_classification
from tests.cluster.heads import free_port, kill_all

from graftstack.runs import find_run

_WHAT_IS_LEFT = """
import json, logging, sys
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

ray.init(address=sys.argv[1], logging_level=logging.ERROR)
alive = [actor.class_name for actor in list_actors(sys.argv[1], filters=[("state", "!=", "DEAD")])]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps(alive + groups))
"""

# Ray's own: one for each cluster, made by its first trainer.
_COORDINATOR = "_AutoscalingCoordinatorActor"

# Ray's own too: one for each trainer. Of one whose driver is killed it may stay: a thread of it asks for its end, and
# Ray looks at that only after its next call, which never comes.
_CLEANER = "PlacementGroupCleaner"

# What fsspec is told of its local file system, which stands for an object store.
_LOCAL_AS_STORE = '{"auto_mkdir": true}'

# What is in the titles of processes that are actors of jobs.
_ACTORS = ("ray::_Process", "ray::_CrewProcess", "RayTrainWorker", "ray::TrainController")


class Nodes:
    """A cluster of nodes on this machine that share no cache; the first has one CPU, and drivers join it there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._others: list[Any] = []
        """All but the first, in the order in which they came."""
        # The usual port may be another Ray's.
        place = {**self._place("head"), "include_dashboard": True, "dashboard_port": free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **place})

    def _place(self, prefix: str) -> dict[str, Any]:
        folder = tempfile.mkdtemp(prefix=f"{prefix}-", dir=self._folder)
        return {"temp_dir": folder, "env_vars": {"GRAFTSTACK_CACHE": f"{folder}/cache"}}

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def overrides(self) -> tuple[str, str]:
        """How jobs join it."""
        return "cluster=ray", f"cluster.address={self.address}"

    def add(self, num_cpus: int = 1) -> None:
        self._others.append(self.cluster.add_node(num_cpus=num_cpus, **self._place("node")))
        self.cluster.wait_for_nodes()

    def lose(self) -> None:
        """Kills all that runs on the node that has come last."""
        last = self._others.pop()
        kill_all(raylet_of(last).pid)
        self.cluster.remove_node(last, allow_graceful=False)

    def lose_head(self) -> None:
        """Kills all that runs on the first node, and with it the cluster; what runs on others is left to itself."""
        head = self.cluster.head_node
        for process in [each.process.pid for those in head.all_processes.values() for each in those]:
            kill_all(process)
        self.cluster.remove_node(head, allow_graceful=False)

    @property
    def raylets(self) -> list[psutil.Process]:
        """Those of the nodes, the first node first: below them is all that jobs run there."""
        return [raylet_of(node) for node in [self.cluster.head_node, *self._others]]

    def titled(self, title: str) -> list[list[psutil.Process]]:
        """The processes in whose titles `title` is, on each node."""
        return [titled(raylet, title) for raylet in self.raylets]

    def num_titled(self, title: str) -> list[int]:
        """How many such processes each node has."""
        return [len(processes) for processes in self.titled(title)]

    def assert_clean(self, *, num_killed: int = 0) -> None:
        """Asserts that no actor, no placement group and no process of a job is left, of which some drivers were killed.

        Each of them may have left Ray's cleaner behind, which takes no CPU.
        """
        deadline = time.monotonic() + 60
        while (left := self._left_behind()) != [_CLEANER] * min(num_killed, len(left)):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)

    def _left_behind(self) -> list[str]:
        words = [sys.executable, "-c", _WHAT_IS_LEFT, self.address]
        answer = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
        left = [name for name in json.loads(answer.stdout.splitlines()[-1]) if name != _COORDINATOR]
        # The processes of tasks are Ray's, which keeps them warm.
        of_actors = [name for title in _ACTORS for processes in self.titled(title) for name in [title] * len(processes)]
        return left + of_actors


@dataclass(frozen=True)
class Work:
    """One job, small, and its runs in one folder; nobody broke off the one that is called ``unbroken``."""

    job: str
    folder: Path
    settings: Callable[[str], tuple[str, ...]]
    """All but where it runs, for a run of this name."""
    on_nodes: tuple[str, ...]
    """How it uses a cluster of two nodes."""
    busy: str
    """What is in the titles of processes that work for it right now."""
    total: int
    """How far it is at its end."""
    progress_of: Callable[[Path], int]
    """How far a run is: counts what is on disk for good."""
    saved_of: Callable[[Path], Mapping[str, int]]
    """The files of a run that keep what is done, and when each was written, in nanoseconds."""
    redone: Callable[[Mapping[str, int], Mapping[str, int]], set[str]]
    """What was done again between two looks at those files."""
    assert_same: Callable[[Path, Path], None]
    """Asserts that a run found what another one did."""
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    seen: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """The files of each run at the last look."""

    @cached_property
    def unbroken(self) -> Path:
        """The run that no other may differ from."""
        self.end("unbroken", self.begin("unbroken", "cluster=inline"))
        return self.folder / "unbroken"

    def begin(self, name: str, *overrides: str) -> "subprocess.Popen[bytes]":
        return self.start(name, *self.settings(name), *overrides)

    def resume(self, name: str, *overrides: str) -> "subprocess.Popen[bytes]":
        return self.start(name, "resume=true", *overrides)

    def start(self, name: str, *overrides: str) -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-m", "graftstack", self.job, *overrides, f"name={name}", f"runs_dir={self.folder}"]
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
            )
        self.started.append(process)
        return process

    def end(self, name: str, driver: "subprocess.Popen[bytes]") -> None:
        """Waits until the driver ends well, and looks that nothing is done again."""
        self._await(lambda: driver.poll() is not None, name, 400)
        assert driver.poll() == 0, self.said(name)
        self.assert_nothing_redone(name)

    def said(self, name: str) -> str:
        """What all drivers of a run have said."""
        return self._log(name).read_text()

    def progress(self, name: str) -> int:
        return self.progress_of(self.folder / name)

    def wait_until(self, condition: Callable[[], bool], name: str, driver: "subprocess.Popen[bytes]") -> None:
        """Waits while the driver works, and looks that nothing is done again."""

        def is_true() -> bool:
            is_over = driver.poll() is not None  # what was true when it ended still is
            if condition():
                return True
            assert not is_over, f"it is over already\n{self.said(name)}"
            return False

        self._await(is_true, name, 240)

    def _await(self, condition: Callable[[], bool], name: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.assert_nothing_redone(name)
            assert time.monotonic() < deadline, f"waited in vain\n{self.said(name)}"
            time.sleep(0.05)

    def assert_nothing_redone(self, name: str) -> None:
        """Asserts that a run has gone on from where it was at the last look, whoever led it then."""
        saved = self.saved_of(self.folder / name)
        again = self.redone(self.seen.get(name, {}), saved)
        assert not again, f"what was finished was done again: {sorted(again)}\n{self.said(name)}"
        self.seen[name] = saved

    def assert_as_unbroken(self, name: str) -> None:
        """Asserts that a run has found what the unbroken one did, and keeps the same files."""
        assert find_run(name, str(self.folder)).manifest.status == "done"
        self.assert_same(self.folder / name, self.unbroken)
        files = files_of(self.folder / name)
        assert files == files_of(self.unbroken), "a killed writer's leftovers outlive the run"

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def newest_step(run: Path) -> int:
    """After how many steps a training was last saved."""
    saved = run.glob("checkpoints/step-*.json")
    return max((int(path.stem.removeprefix("step-")) for path in saved), default=0)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def times_of(folder: Path, pattern: str) -> dict[str, int]:
    """When each of some files was written, in nanoseconds."""
    times = {}
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # a newer checkpoint has come in its stead
            times[path.name] = path.stat().st_mtime_ns
    return times


def times_of_checkpoints(run: Path) -> dict[str, int]:
    return times_of(run, "checkpoints/step-*.json")


def rewritten(before: Mapping[str, int], now: Mapping[str, int]) -> set[str]:
    """Files that are gone, or were written again."""
    return {name for name, at in before.items() if now.get(name) != at}


def rewritten_steps(before: Mapping[str, int], now: Mapping[str, int]) -> set[str]:
    """Checkpoints that were written since, though a later one, or the same, was there: old ones are removed."""
    newest = max(before, default="")  # names have leading zeros
    return {name for name, at in now.items() if before.get(name) != at and name <= newest}


def assert_same_bytes(run: Path, expected: Path, *files: str) -> None:
    for file in files:
        assert (run / file).read_bytes() == (expected / file).read_bytes(), file


def raylet_of(node: Any) -> psutil.Process:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def titled(parent: psutil.Process, title: str) -> list[psutil.Process]:
    """The processes below one in whose titles `title` is."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in parent.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in "".join(process.cmdline()[:1]):
                    found.append(process)
    return found


# So many that each of them is seen by who looks now and then.
KEPT = "checkpoint.num_to_keep=10"

NUM_EPOCHS, STEPS_PER_EPOCH = 6, 1437 // 8


def finetune(folder: Path) -> Work:
    """Only the head trains, gently and behind frozen BatchNorm.

    Then any number of workers takes the same steps, up to rounding that stays small, and a step that is lost or taken
    twice shows in the losses.
    """
    common = (
        *("data=digits", "data.image_size=24", "backbone=conv4", "batch_size=8", "select=last"),
        "cluster.cpus_per_worker=1",
    )
    head = (
        *("backbone.weights=run:base", "freeze_depth=all", "optimizer.head_lr_multiplier=1"),
        *(f"epochs={NUM_EPOCHS}", "checkpoint.every_steps=10", KEPT),
    )
    words = [sys.executable, "-m", "graftstack", "pretrain", *common, f"runs_dir={folder}", "name=base", "epochs=2"]
    subprocess.run([*words, "cluster=inline"], check=True, capture_output=True, timeout=250)
    return Work(
        "finetune",
        folder,
        settings=lambda _: (*common, *head),
        on_nodes=("cluster.num_workers=2", "cluster.max_failures=20"),
        busy="RayTrainWorker",
        total=NUM_EPOCHS * STEPS_PER_EPOCH,
        progress_of=newest_step,
        saved_of=times_of_checkpoints,
        redone=rewritten_steps,
        assert_same=assert_same_training,
    )


def assert_same_training(run: Path, expected: Path) -> None:
    """Every step was taken exactly once: the epochs' mean losses, the model and its metrics are the unbroken run's."""
    import torch
    from safetensors.torch import load_file

    history, wanted = (pq.read_table(each / "metrics.parquet").to_pylist() for each in (run, expected))
    assert [row["epoch"] for row in history] == list(range(1, NUM_EPOCHS + 1))
    for row, other in zip(history, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5), row
    model = load_file(run / "model" / "model.safetensors")
    for name, tensor in load_file(expected / "model" / "model.safetensors").items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert newest_step(run) == NUM_EPOCHS * STEPS_PER_EPOCH
    accuracy, best = (find_run(each.name, str(each.parent)).manifest.metrics["accuracy"] for each in (run, expected))
    assert accuracy > 0.9
    assert accuracy == pytest.approx(best, abs=0.003)


def sweep(folder: Path) -> Work:
    """Trials in 17 units, the last of eight heads, that train side by side and read taps that all nodes share."""
    settings = (
        *("data=digits", "data.image_size=16", "backbone=conv4", "epochs=12", "batch_size=32"),
        "cluster.cpus_per_worker=1",  # as many threads everywhere: then sums are the same to the last bit
        *("space.freeze_depth=[0,2,all]", "space.lr=[1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,8e-3,1e-2]"),
    )
    return Work(
        "sweep",
        folder,
        settings=lambda name: (*settings, f"taps.location={folder}/{name}-taps"),
        on_nodes=(),
        busy="ray::_Process.call",
        total=24,
        progress_of=lambda run: len(times_of(run, "trials/*.json")),
        saved_of=lambda run: times_of(run, "trials/*.json"),
        redone=rewritten,
        assert_same=assert_same_sweep,
    )


def assert_same_sweep(run: Path, expected: Path) -> None:
    found, wanted = (find_run(each.name, str(each.parent)).manifest for each in (run, expected))
    assert (found.metrics, found.details) == (wanted.metrics, wanted.details)
    assert [without_time(row) for row in found.results["trials"]] == [
        without_time(row) for row in wanted.results["trials"]
    ]
    for path in expected.glob("trials/*.json"):
        row, other = (json.loads((each / "trials" / path.name).read_text()) for each in (run, expected))
        assert row["history"] == other["history"], path.name
    assert_same_bytes(run, expected, "model/model.safetensors", "metrics.parquet", "val_predictions.parquet")


def without_time(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def stack(folder: Path) -> Work:
    """Four base models of five folds and a refit, about a second each."""
    features, labels = make_classification(1500, 20, n_informative=10, n_classes=3, random_state=0)
    frame = pd.DataFrame(features.astype(np.float32), columns=[f"number{i}" for i in range(20)])
    frame["label"] = np.array(["ant", "bee", "cat"])[labels]
    frame.to_parquet(folder / "table.parquet")
    settings = (
        *("data=parquet", "data.path=table.parquet", "data.label=label"),
        "base_models=[{GradientBoostingClassifier:{n_estimators:60}},"
        "{GradientBoostingClassifier:{n_estimators:80,max_depth:2,subsample:0.8,name:shallow}},"
        "{GradientBoostingClassifier:{n_estimators:70,max_features:7,name:narrow}},"
        "{ExtraTreesClassifier:{n_estimators:400}}]",
    )
    return Work(
        "stack",
        folder,
        settings=lambda _: settings,
        on_nodes=(),
        busy="ray::_perform",
        total=4 * (5 + 1),
        progress_of=lambda run: len(times_of(run, "ledger/*.json")),
        saved_of=lambda run: times_of(run, "ledger/*.json"),
        redone=rewritten,
        assert_same=assert_same_stack,
    )


def assert_same_stack(run: Path, expected: Path) -> None:
    found, wanted = (find_run(each.name, str(each.parent)).manifest for each in (run, expected))
    assert found.metrics == wanted.metrics
    assert found.details["num_tasks_run"] + found.details["num_tasks_known"] == wanted.details["num_tasks_run"]
    assert hashlib.sha256((run / "oof.parquet").read_bytes()).digest() == (
        hashlib.sha256((expected / "oof.parquet").read_bytes()).digest()
    )
    assert_same_bytes(run, expected, *(f"ledger/{path.name}" for path in expected.glob("ledger/*.npz")))


def meta(folder: Path) -> Work:
    """Steps of four episodes, of which each is saved soon."""
    num_steps = 1200
    settings = (
        *("data=digits", "data.image_size=24", "backbone=conv4", "num_ways=3", "num_queries=10"),
        *("episodes_per_step=4", f"num_episodes={4 * num_steps}", "eval.every_episodes=800"),
        *("eval.val_fraction=0.3", "eval.test_fraction=0.3", "checkpoint.every_steps=5", KEPT),
    )
    return Work(
        "meta",
        folder,
        settings=lambda _: settings,
        on_nodes=("cluster.num_workers=2", "cluster.max_failures=9"),
        busy="ray::_CrewProcess.go_through",
        total=num_steps,
        progress_of=newest_step,
        saved_of=times_of_checkpoints,
        redone=rewritten_steps,
        assert_same=assert_same_meta,
    )


def assert_same_meta(run: Path, expected: Path) -> None:
    """To the last bit."""
    found, wanted = (find_run(each.name, str(each.parent)).manifest for each in (run, expected))
    assert (found.metrics, found.details, found.results) == (wanted.metrics, wanted.details, wanted.results)
    assert len(wanted.results["curve"]) == 7
    files = [str(path.relative_to(expected)) for path in expected.rglob("*.safetensors")]
    assert_same_bytes(run, expected, *files)  # models, and checkpoints with all state


WORKS: dict[str, Callable[[Path], Work]] = {"finetune": finetune, "sweep": sweep, "stack": stack, "meta": meta}


@pytest.fixture(scope="session")
def work_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Work]]:
    """Returns the small job of a kind."""
    works: dict[str, Work] = {}

    def work_of(job: str) -> Work:
        if job not in works:
            works[job] = WORKS[job](tmp_path_factory.mktemp(f"{job}-runs"))
        return works[job]

    yield work_of
    for work in works.values():
        for process in work.started:
            process.kill()


@contextmanager
def clusters() -> Iterator[Callable[[], Nodes]]:
    """Gives what starts clusters of a single node, which end with the block."""
    started: list[Nodes] = []
    # Sockets lie in this folder, and the name of a socket is short.
    folders = tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True)
    with pytest.MonkeyPatch.context() as patch, folders as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("FSSPEC_LOCAL", _LOCAL_AS_STORE)

        def start_nodes() -> Nodes:
            started.append(Nodes(Path(folder)))
            return started[-1]

        try:
            yield start_nodes
        finally:
            for nodes in started:
                nodes.cluster.shutdown()


@pytest.fixture
def start_nodes() -> Iterator[Callable[[], Nodes]]:
    """Starts clusters of a single node, which end with the test."""
    with clusters() as start_nodes:
        yield start_nodes


@pytest.fixture
def nodes(start_nodes: Callable[[], Nodes]) -> Nodes:
    """A cluster of two nodes, with one CPU each."""
    nodes = start_nodes()
    nodes.add()
    return nodes


@pytest.fixture(scope="module")
def lasting_nodes() -> Iterator[Nodes]:
    """A cluster of two nodes, with one CPU each, for all tests of a file, which lose none."""
    with clusters() as start_nodes:
        nodes = start_nodes()
        nodes.add()
        yield nodes
