"""A sweep on two nodes that share nothing but a folder: both train, and the trials are those of one process."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    *("data=digits", "data.image_size=24", "backbone=conv4", "epochs=4", "batch_size=32"),
    "cluster.cpus_per_worker=1",  # as many threads everywhere: then sums are the same to the last bit
    *("space.freeze_depth=[0,2,all]", "space.lr=[1e-3,1e-2]"),
)

_WHAT_IS_LEFT = """
import json, logging, sys
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

ray.init(address=sys.argv[1], logging_level=logging.ERROR)
alive = [actor.class_name for actor in list_actors(filters=[("state", "!=", "DEAD")])]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps(alive + groups))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A cluster of two nodes on this machine, with one CPU each."""
    # Sockets lie in these folders, and the name of a socket is short.
    folders = tempfile.TemporaryDirectory(prefix="two-nodes-", ignore_cleanup_errors=True)
    with pytest.MonkeyPatch.context() as patch, folders as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # What fsspec is told here holds for its local file system, which stands for an object store.
        patch.setenv("FSSPEC_LOCAL", '{"auto_mkdir": true}')
        patch.setenv("GRAFTSTACK_CACHE", f"{folder}/cache-of-head")
        head = {
            "num_cpus": 1,
            "temp_dir": f"{folder}/head",
            "include_dashboard": True,
            "dashboard_port": free_port(),  # the usual one may be another Ray's
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            patch.setenv("GRAFTSTACK_CACHE", f"{folder}/cache-of-second")
            cluster.add_node(num_cpus=1, temp_dir=f"{folder}/second")
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the sweep that no other may differ from."""
    path = tmp_path_factory.mktemp("runs")
    subprocess.run(command(path, "cluster=inline", "name=unbroken"), check=True, capture_output=True, timeout=250)
    return path


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "graftstack", "sweep", *SMALL, f"runs_dir={runs_dir}", *overrides]


def busy_processes(cluster: Cluster) -> list[int]:
    """How many processes of a pool do something, on each node."""
    counts = []
    for node in cluster.list_all_nodes():
        [raylet] = node.all_processes["raylet"]
        counts.append(0)
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                counts[-1] += process.cmdline()[:1] == ["ray::_Process.call"]
    return counts


def left_behind(address: str) -> list[str]:
    """What actors and placement groups are still there."""
    words = [sys.executable, "-c", _WHAT_IS_LEFT, address]
    answer = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    left: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return left


def trials_of(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    """All that the manifest says of the trials but their times."""
    rows = find_run(name, str(runs_dir)).manifest.results["trials"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("scheme", ["", "file://", "local://"], ids=["path", "file", "URI"])
def test_a_sweep_on_two_nodes_is_the_one_in_one_process(two_nodes: Cluster, runs_dir: Path, scheme: str) -> None:
    name = f"two-{scheme.removesuffix('://') or 'path'}"
    words = command(
        runs_dir,
        *("cluster=ray", f"cluster.address={two_nodes.address}", f"name={name}"),
        f"taps.location={scheme}{runs_dir}/{name}-taps",
    )
    busy: set[tuple[int, ...]] = set()
    with (runs_dir / f"{name}.log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                busy.add(tuple(busy_processes(two_nodes)))
                time.sleep(0.1)
        finally:
            process.kill()
    assert process.returncode == 0, (runs_dir / f"{name}.log").read_text()
    assert (1, 1) in busy, "one node did nothing"
    assert list((runs_dir / f"{name}-taps").glob("*/shard-*.arrow")), "the taps lie elsewhere"
    assert trials_of(runs_dir, name) == trials_of(runs_dir, "unbroken")
    reuse = find_run(name, str(runs_dir)).manifest.results["reuse"]
    assert reuse["backbone_forwards"] == reuse["unique_samples"]
    deadline = time.monotonic() + 60
    while left := left_behind(two_nodes.address):
        assert time.monotonic() < deadline, left
        time.sleep(1)


def test_nodes_that_share_no_taps_each_make_what_they_lack(two_nodes: Cluster, runs_dir: Path) -> None:
    words = command(runs_dir, "cluster=ray", f"cluster.address={two_nodes.address}", "name=apart")
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    apart, unbroken = (find_run(name, str(runs_dir)).manifest.results for name in ("apart", "unbroken"))
    assert [row["metrics"] for row in apart["trials"]] == [row["metrics"] for row in unbroken["trials"]]
    # The process that leads makes all of them, for the node it is on.
    assert 1 <= apart["reuse"]["backbone_forwards"] / apart["reuse"]["unique_samples"] <= 3


def test_trials_that_fit_on_no_node_are_refused_before_anything_starts(two_nodes: Cluster, runs_dir: Path) -> None:
    wide = ("cluster=ray", f"cluster.address={two_nodes.address}", "name=wide", "cluster.cpus_per_worker=2")
    refused = subprocess.run(command(runs_dir, *wide), capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "the nodes there are hold 0 workers of 2 CPUs" in refused.stderr
    assert not (runs_dir / "wide").exists()
