"""What slow tests of meta-learning share: a cluster that loses nodes, and runs of one training."""

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
import pytest
from ray.cluster_utils import Cluster

from graftstack.runs import find_run


class Nodes:
    """A cluster of nodes on this machine, that share nothing: the first has one CPU, and never goes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        head = {
            "num_cpus": 1,
            "temp_dir": str(folder / "head"),
            "include_dashboard": True,
            "dashboard_port": free_port(),  # the usual one may be another Ray's
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def overrides(self) -> tuple[str, str]:
        """How jobs join it."""
        return "cluster=ray", f"cluster.address={self.cluster.address}"

    def add(self, num_cpus: int = 1) -> None:
        self.cluster.add_node(num_cpus=num_cpus, temp_dir=tempfile.mkdtemp(prefix="node-", dir=self._folder))

    def lose(self) -> None:
        """Kills all that runs on the node that has come last."""
        last = self.cluster.list_all_nodes()[-1]
        for process in [raylet_of(last), *raylet_of(last).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(last, allow_graceful=False)

    @property
    def busy(self) -> list[list[psutil.Process]]:
        """The processes of crews that go through a block right now, on each node."""
        return [titled(node, "ray::_CrewProcess.go_through") for node in self.cluster.list_all_nodes()]

    @property
    def num_workers(self) -> int:
        """Processes of crews, whatever they do."""
        return sum(len(titled(node, "ray::_CrewProcess")) for node in self.cluster.list_all_nodes())

    def assert_clean(self) -> None:
        """Asserts that no actor and no process of a crew is left."""
        from ray.util.state import list_actors

        deadline = time.monotonic() + 60
        while left := list_actors(self.cluster.address, filters=[("state", "!=", "DEAD")]) or self.num_workers:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


class MetaRuns:
    """Runs of one meta-training; nobody broke off the one that is called ``unbroken``."""

    NUM_STEPS = 1200

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fresh = (
            *("data=digits", "data.image_size=24", "backbone=conv4", "num_ways=3", "num_queries=10"),
            *("episodes_per_step=4", f"num_episodes={4 * self.NUM_STEPS}", "eval.every_episodes=800"),
            *("eval.val_fraction=0.3", "eval.test_fraction=0.3", "checkpoint.every_steps=5"),
        )
        self.started: list[subprocess.Popen[bytes]] = []
        self.end("unbroken", self.start("unbroken", *self.fresh, "cluster=inline"))

    def start(self, name: str, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "graftstack", "meta", *overrides, f"name={name}", f"runs_dir={self.folder}"]
        with self._log(name).open("ab") as log:
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder))
        return self.started[-1]

    def end(self, name: str, driver: subprocess.Popen[bytes]) -> None:
        assert driver.wait(500) == 0, self._log(name).read_text()

    def newest_step(self, name: str) -> int:
        """After how many steps the run was last saved."""
        saved = (self.folder / name).glob("checkpoints/step-*.json")
        return max((int(path.stem.removeprefix("step-")) for path in saved), default=0)

    def wait_until(self, condition: Callable[[], bool], name: str, driver: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert driver.poll() is None, f"it is over already\n{self._log(name).read_text()}"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def assert_as_unbroken(self, name: str) -> None:
        """Asserts that a run has found what the unbroken one did, to the last bit, and keeps the same files."""
        found, wanted = (find_run(each, str(self.folder)).manifest for each in (name, "unbroken"))
        assert found.status == wanted.status == "done"
        assert (found.metrics, found.details, found.results) == (wanted.metrics, wanted.details, wanted.results)
        assert len(wanted.results["curve"]) == 7
        files = self._files(name)
        assert files == self._files("unbroken"), "a killed writer's leftovers outlive the run"
        for file in (file for file in files if file.endswith(".safetensors")):  # models, and checkpoints with all state
            assert (self.folder / name / file).read_bytes() == (self.folder / "unbroken" / file).read_bytes(), file

    def _files(self, name: str) -> set[str]:
        return {str(path.relative_to(self.folder / name)) for path in (self.folder / name).rglob("*")}

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def raylet_of(node: Any) -> psutil.Process:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def titled(node: Any, title: str) -> list[psutil.Process]:
    """The processes of a node whose titles begin so."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in raylet_of(node).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "".join(process.cmdline()[:1]).startswith(title):
                    found.append(process)
    return found


@pytest.fixture(scope="session")
def meta_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetaRuns]:
    """Where all runs of the training lie."""
    runs = MetaRuns(tmp_path_factory.mktemp("meta-runs"))
    yield runs
    for process in runs.started:
        process.kill()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster of two nodes, with one CPU each."""
    # Sockets lie in this folder, and the name of a socket is short.
    folders = tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True)
    with pytest.MonkeyPatch.context() as patch, folders as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        nodes = Nodes(Path(folder))
        try:
            nodes.add()
            nodes.cluster.wait_for_nodes()
            yield nodes
        finally:
            nodes.cluster.shutdown()
