"""The doctor and a real cluster of two nodes with a token: what is sound is found sound, and each fault is named."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from tests.cluster.heads import RunningHead, environment_without_ray, running_head, running_worker, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOKEN = "the-token-of-the-cluster-that-the-doctor-sees"
THREADS = "4096"

# What the fixture decides; the disk of the machine and the like are as they are.
CONTROLLED = (
    "cluster",
    "token",
    "Ray's version",
    "Python's version",
    "graftstack there",
    "torch there",
    "nodes",
    "storage",
    "shared storage",
)


class Seen(NamedTuple):
    """What the doctor printed, and how it ended."""

    status: int
    findings: dict[str, Any]
    progress: list[str]


def doctor(*words: str, **environ: str) -> Seen:
    """``graftstack doctor --json``, as a process of its own."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "graftstack", "doctor", "--json", *words],
        env={**environment_without_ray(), "RAY_AUTH_TOKEN": TOKEN, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    print(f"doctor {' '.join(words)}: {time.monotonic() - began:.1f} s")
    assert done.stdout, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == int(any(finding["status"] == "broken" for finding in findings.values()))
    return Seen(done.returncode, findings, done.stderr.splitlines())


def get(head: RunningHead, path: str) -> Any:
    return requests.get(f"{head.dashboard}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20).json()


@pytest.fixture(scope="module")
def head() -> Iterator[RunningHead]:
    """Two nodes, each with a folder of its own; the second has far more threads than CPUs."""
    with running_head(TOKEN, ["--num-cpus=1"]) as found, running_worker(found, environ={"OMP_NUM_THREADS": THREADS}):
        wait_until(lambda: len(get(found, "/nodes?view=summary")["data"]["summary"]) == 2)
        yield found


def test_a_sound_cluster_is_found_sound_and_left_as_it_was(head: RunningHead, tmp_path: Path):
    """The address of the cluster will do as well as that of its dashboard."""
    (tmp_path / "of-others").touch()
    runs_dir = tmp_path / "runs"
    seen = doctor("--to", head.gcs, "--runs-dir", str(runs_dir))
    assert {name: seen.findings[name]["status"] for name in CONTROLLED} == dict.fromkeys(CONTROLLED, "ok"), seen
    assert seen.findings["cluster"]["detail"] == f"takes jobs at {head.dashboard}"
    assert seen.findings["nodes"]["detail"] == "2, with 2 CPUs and 0 GPUs"
    assert seen.findings["shared storage"]["detail"] == f"{runs_dir}: 2 nodes see each other's files"
    assert seen.progress[-1] == "nodes: 2; a worker starts on each"
    threads = seen.findings["threads"]
    assert threads["status"] == "warn"
    found = re.search(rf"(?:^|, )\S+ \((\w+)\) has OMP_NUM_THREADS={THREADS} for \d+ CPUs", threads["detail"])
    (worker,) = [
        node["raylet"]["nodeId"] for node in get(head, "/nodes?view=summary")["data"]["summary"] if not is_head(node)
    ]
    assert found is not None
    assert worker.startswith(found[1])
    assert [path.name for path in tmp_path.rglob("*")] == ["of-others"]
    assert [job for job in get(head, "/api/jobs/") if job["type"] == "SUBMISSION"] == []
    wait_until(lambda: alive(head, "actors") == 0, 30)


def test_who_interrupts_it_leaves_nothing_behind(head: RunningHead, tmp_path: Path):
    runs_dir = tmp_path / "new" / "runs"
    with subprocess.Popen(
        [sys.executable, "-m", "graftstack", "doctor", "--to", head.dashboard, "--runs-dir", str(runs_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment_without_ray(), "RAY_AUTH_TOKEN": TOKEN},
        # A shell that runs the tests in the background makes them, and so their children, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("nodes: "):
                break
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "graftstack: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert [job for job in get(head, "/api/jobs/") if job["type"] == "SUBMISSION"] == []


def alive(head: RunningHead, kind: str) -> int:
    rows = get(head, f"/api/v0/{kind}?limit=1000&detail=0")["data"]["result"]["result"]
    return sum(row["state"] != "DEAD" for row in rows)


def is_head(node: Any) -> bool:
    return bool(node["raylet"].get("isHeadNode"))


def test_storage_that_each_node_has_for_itself(head: RunningHead):
    """The working folder of a worker lies on its node, so each node has another one."""
    seen = doctor("--to", head.dashboard, "--runs-dir", "/proc/self/cwd/runs")
    finding = seen.findings["shared storage"]
    assert (seen.status, finding["status"]) == (1, "broken")
    assert len(re.findall(r"\S+ \(\w+\) doesn't see what \S+ \(\w+\) wrote", finding["detail"])) == 2
    assert "mount one file system there on all nodes" in finding["fix"]
    assert seen.findings["storage"]["status"] == "ok"


@pytest.mark.parametrize(("token", "why"), [("", "it got none (401)"), ("another", "isn't its own (403)")])
def test_a_token_that_is_missing_or_wrong(head: RunningHead, tmp_path: Path, token: str, why: str):
    seen = doctor("--to", head.dashboard, RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert list(seen.findings) == ["token"]
    assert seen.findings["token"]["status"] == "broken"
    assert why in seen.findings["token"]["detail"]
    assert seen.findings["token"]["fix"].startswith("set RAY_AUTH_TOKEN to its token")
    assert seen.progress == []


def test_two_clusters_on_one_machine(head: RunningHead, tmp_path: Path):
    with running_head("another-token", ["--num-cpus=1"]) as other:
        seen = doctor("--runs-dir", str(tmp_path))
    finding = seen.findings["Ray clusters"]
    assert finding["status"] == "warn"
    ports = {address.rpartition(":")[2] for address in re.findall(r"[\d.]+:\d+", finding["detail"])}
    assert {head.gcs.rpartition(":")[2], other.gcs.rpartition(":")[2]} <= ports
    assert re.match(r"\d+ run here, at .*: address=auto means ", finding["detail"])


def test_a_token_that_ray_is_to_use_and_cannot_find(tmp_path: Path):
    """It is named as Ray itself has it: that refuses to start."""
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    seen = doctor("--runs-dir", str(tmp_path), **environ)
    assert seen.findings["token"]["status"] == "broken"
    with pytest.raises(AssertionError) as refused, running_head("", environ=environ):
        pass
    assert "ray get-auth-token --generate" in " ".join(str(refused.value).split())
