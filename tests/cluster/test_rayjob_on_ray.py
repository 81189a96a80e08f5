"""A rendered RayJob, run as KubeRay runs it: a head without CPUs, a worker node, a token, and a shell that submits."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from graftstack.config.compose import compose_job
from graftstack.config.k8s import K8sConfig
from graftstack.runs import find_run
from graftstack.submit.manifest import to_manifest
from graftstack.submit.render import SPEC_FILE, render
from graftstack.submit.submissions import spec_on_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "the-token-that-kuberay-makes-for-this-cluster"
CONFIG = K8sConfig(image="graftstack:0.1.0-ray2.60.0", worker_cpus=1)
NAME = "$HOME `id` \"two\" 'one' ; && | é 🙂"
WORDS = [
    *("data=digits", "data.image_size=8", "data.num_train_per_class=8", "backbone=conv4", "epochs=1", "batch_size=32"),
    f"name={NAME}",
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(folder: Path) -> dict[str, str]:
    left_out = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH")
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return {key: value for key, value in os.environ.items() if key not in left_out} | own


def start(words: list[str], storage: Path, folder: Path, stack: ExitStack) -> None:
    """Starts a node as a pod would: its working folder is the claim, and its temporary folder is its own."""
    folder.mkdir()
    log = stack.enter_context((folder / "log").open("wb"))
    options = ["--block", "--disable-usage-stats", f"--temp-dir={folder}", f"--object-store-memory={100 * 1024**2}"]
    process = subprocess.Popen(
        ["ray", "start", *words, *options, "--node-ip-address=127.0.0.1"],
        cwd=storage,
        env=environment(folder),
        stdout=log,
        stderr=log,
    )
    stack.callback(kill, process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@pytest.fixture(scope="module")
def job() -> Mapping[str, Any]:
    found: dict[str, Any] = to_manifest(rendered().ray_job)["spec"]
    return found


def rendered() -> Any:
    spec = spec_on_cluster("finetune", compose_job("finetune", WORDS), WORDS, has_our_paths=False)
    return render(spec, CONFIG)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def address(job: Mapping[str, Any], storage: Path) -> Iterator[str]:
    """A head and one worker, with the parameters and the resources of the manifest."""
    cluster = job["rayClusterSpec"]
    params = {**cluster["headGroupSpec"]["rayStartParams"], "dashboard-host": "127.0.0.1"}
    port, dashboard = free_port(), free_port()
    (container,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    # Sockets lie in this folder, and the name of a socket is short.
    with (
        tempfile.TemporaryDirectory(prefix="rayjob-", dir="/tmp", ignore_cleanup_errors=True) as root,
        ExitStack() as stack,
    ):
        head = [f"--{key}={value}" for key, value in params.items()]
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
        agent = f"--dashboard-agent-listen-port={free_port()}"
        start(["--head", *head, *ports, agent], storage, Path(root, "head"), stack)
        found = f"http://127.0.0.1:{dashboard}"
        wait_for(found)
        worker = [f"--address=127.0.0.1:{port}", f"--num-cpus={container['resources']['limits']['cpu']}"]
        start([*worker, f"--dashboard-agent-listen-port={free_port()}"], storage, Path(root, "worker"), stack)
        yield found


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with suppress(requests.RequestException):
            headers = {"Authorization": f"Bearer {TOKEN}"}
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).ok:
                return
        time.sleep(0.2)
    raise AssertionError(f"{address}: no head")


def test_the_head_answers_nobody_without_the_token(address: str):
    assert requests.get(f"{address}/api/jobs/", timeout=5).status_code == 401


def test_the_entrypoint_runs_the_job_to_its_end(address: str, job: Mapping[str, Any], storage: Path, tmp_path: Path):
    (tmp_path / SPEC_FILE).write_text(rendered().config_map.data[SPEC_FILE], encoding="utf-8")
    # The folders of the image and of the mounted file lie elsewhere on this machine.
    entrypoint = job["entrypoint"].replace("/opt/graftstack", str(ROOT)).replace("/etc/graftstack", str(tmp_path))
    # As the operator has it in the submitter's command, in a shell.
    submit = f"ray job submit --address {address} --submission-id job-1 --no-wait -- {entrypoint} ;"
    follow = f"ray job logs --address {address} --follow job-1"
    done = subprocess.run(
        ["/bin/bash", "-ce", "--", f"{submit} {follow}"],
        env=environment(tmp_path),
        check=False,
        capture_output=True,
        text=True,
    )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    info = requests.get(f"{address}/api/jobs/job-1", headers=headers, timeout=20).json()
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0), done.stdout + done.stderr
    # Below the claim, which is the working folder of every pod, under the name that the user gave it.
    assert find_run(NAME, str(storage / "runs")).manifest.status == "done"
