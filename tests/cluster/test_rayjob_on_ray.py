"""A rendered RayJob, run as KubeRay runs it: a head without CPUs, a worker node, a token, and a shell that submits."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.cluster.heads import node_environment, running_head, running_worker

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
def address(job: Mapping[str, Any], storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head and one worker, with the parameters and the resources of the manifest; each is in the claim's folder."""
    cluster = job["rayClusterSpec"]
    (container,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    head = [f"--{key}={value}" for key, value in cluster["headGroupSpec"]["rayStartParams"].items()]
    cpus = [f"--num-cpus={container['resources']['limits']['cpu']}"]
    environ = {"HOME": str(tmp_path_factory.mktemp("home"))}
    with (
        running_head(TOKEN, head, cwd=storage, environ=environ) as found,
        running_worker(found, cpus, cwd=storage, environ=environ),
    ):
        yield found.dashboard


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
        env=node_environment(TOKEN) | {"HOME": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    info = requests.get(f"{address}/api/jobs/job-1", headers=headers, timeout=20).json()
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0), done.stdout + done.stderr
    # Below the claim, which is the working folder of every pod, under the name that the user gave it.
    assert find_run(NAME, str(storage / "runs")).manifest.status == "done"
