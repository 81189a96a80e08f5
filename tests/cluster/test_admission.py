"""Jobs on a cluster that has no room yet: its autoscaler brings nodes, or it is said that none will come."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address
from tests.cluster.heads import free_port, node_environment, running_head

from graftstack.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOKEN = "the-token-of-a-cluster-that-grows"

# The id that the provider of nodes on this machine knows the head by.
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"

META = (
    *("data=digits", "data.image_size=8", "backbone=conv4", "method=fomaml", "num_ways=3", "num_queries=5"),
    *("inner_lr=0.1", "episodes_per_step=4", "num_episodes=40", "eval.num_episodes=4", "eval.val_fraction=0"),
    *("eval.test_fraction=0.3", "cluster.cpus_per_worker=1"),
)
FINETUNE = ("data=digits", "data.image_size=8", "backbone=conv4", "epochs=1", "cluster.cpus_per_worker=1")

# Takes all that the cluster may have, says so, and keeps it until its input ends.
_HOLDER = """
import sys, logging, ray
from ray.util.placement_group import placement_group
ray.init(address=sys.argv[1], logging_level=logging.ERROR)
group = placement_group([{"CPU": 1}] * 2)
assert group.wait(60)
print("taken", flush=True)
sys.stdin.read()
"""

# Waits for all that the cluster may have, takes it for a moment, and lets go of it.
_WAITER = """
import sys, time, logging, ray
from ray.util.placement_group import placement_group
from graftstack.cluster.admission import admit
from graftstack.config.schema import ClusterConfig, ClusterKind
ray.init(address=sys.argv[1], logging_level=logging.ERROR)
admit(ClusterConfig(kind=ClusterKind.ray, num_workers=2, cpus_per_worker=1, max_wait_s=100), num_cpus=1)
assert placement_group([{"CPU": 1}] * 2).wait(100)
time.sleep(3)
"""


def autoscaling(gcs_address: str) -> dict[str, object]:
    """What Ray's autoscaler is told: the head has no CPUs, and up to two nodes of one CPU each may come."""
    nodes = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {
            "resources": {"CPU": 1, "object_store_memory": 80 * 1024**2},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "gcs_address": gcs_address,
    }
    # It wants all of its keys; what runs on nodes that it starts over a network, for instance.
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        **{f"{name}_commands": [] for name in commands},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "auth": {"ssh_user": ""},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_name": "grows",
        "provider": provider,
        "available_node_types": nodes,
        "head_node_type": "ray.head.default",
        "max_workers": 2,
        "idle_timeout_minutes": 10,
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A cluster with an autoscaler, as words for jobs: it has no CPU until somebody waits for one."""
    folder, ip, port = tmp_path_factory.mktemp("autoscaling"), get_node_ip_address(), free_port()
    (folder / "nodes.json").write_text(json.dumps(autoscaling(f"{ip}:{port}")))
    options = (
        *("--num-cpus=0", f"--autoscaling-config={folder}/nodes.json"),
        *(f"--port={port}", f"--node-ip-address={ip}"),  # at which its nodes look for it
    )
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="grown-", dir="/tmp") as of_nodes:
        for key, value in node_environment(TOKEN).items():
            patch.setenv(key, value)
        with running_head(TOKEN, options, environ={**environment, "RAY_TMPDIR": of_nodes}):
            yield "cluster=ray", f"cluster.address={ip}:{port}"


def run(job: str, name: str, runs_dir: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "graftstack", job, *overrides, f"name={name}", f"runs_dir={runs_dir}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)


def test_what_an_autoscaler_never_brings_is_refused(cluster: tuple[str, str], tmp_path: Path) -> None:
    refused = run("finetune", "never", tmp_path, *FINETUNE, *cluster, "cluster.num_workers=3")
    assert refused.returncode == 2, refused.stderr
    said = refused.stderr.splitlines()[-1]
    needed = "3 workers of 1 CPUs and 0 GPUs each"
    assert said.startswith(
        f"graftstack: cluster.num_workers=3: {needed} will never fit on this cluster: its autoscaler"
    )
    assert not (tmp_path / "never").exists()


def test_who_waits_for_what_is_brought_for_another_is_not_told_that_it_never_comes(cluster: tuple[str, str]) -> None:
    words = [sys.executable, "-c", _WAITER, cluster[1].partition("=")[2]]
    waiters = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    try:
        said = [waiter.communicate(timeout=200)[0] for waiter in waiters]
    finally:
        for waiter in waiters:
            waiter.kill()
    assert [waiter.returncode for waiter in waiters] == [0, 0], said


def test_a_job_waits_for_the_nodes_that_its_autoscaler_brings(cluster: tuple[str, str], tmp_path: Path) -> None:
    done = run("meta", "grown", tmp_path, *META, *cluster, "cluster.num_workers=2")
    assert done.returncode == 0, done.stderr
    alone = run("meta", "alone", tmp_path, *META, "cluster=inline")
    assert alone.returncode == 0, alone.stderr
    grown, expected = (find_run(name, str(tmp_path)).manifest for name in ("grown", "alone"))
    assert grown.metrics == expected.metrics


def test_a_job_that_finds_no_room_in_time_says_for_what_it_waited(cluster: tuple[str, str], tmp_path: Path) -> None:
    address = cluster[1].partition("=")[2]
    words = [sys.executable, "-c", _HOLDER, address]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        assert holder.stdout is not None
        assert (told := holder.stdout.readline()) == "taken\n", told + holder.stdout.read()
        late = run("finetune", "late", tmp_path, *FINETUNE, *cluster, "cluster.num_workers=2", "cluster.max_wait_s=7")
    finally:
        holder.kill()
        holder.communicate()
    assert late.returncode == 1, late.stderr
    *_, waiting, said = late.stderr.splitlines()
    # The head and two that came.
    there = "the 3 nodes of the cluster have 2 CPUs, 0 of them free and 0 GPUs, 0 of them free"
    needed = "2 workers of 1 CPUs and 0 GPUs each"
    assert waiting.startswith(f"waiting for room for {needed}, ")
    assert waiting.endswith(f" s more: {there}")
    assert said == (
        f"graftstack: cluster.max_wait_s=7: no room for {needed} came in that time: {there}; wait longer, or use fewer "
        "or smaller workers"
    )
    assert not (tmp_path / "late").exists()
