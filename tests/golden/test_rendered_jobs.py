"""The objects of whole command lines, byte for byte: k8s/rendered/ shows a reader what is applied.

To record them anew, after a change that is meant to move them: make rendered
"""

import io
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from graftstack.cli import main

FOLDER = Path(__file__).resolve().parents[2] / "k8s/rendered"

IMAGE = "k8s.image=registry.example.com/graftstack:0.1.0-ray2.60.0"
FLOWERS = ("data=image_folder", "data.path=flowers", "backbone=resnet18")

COMMANDS: dict[str, tuple[str, ...]] = {
    "finetune": ("finetune", *FLOWERS, "name=flowers", "cluster.num_workers=2", IMAGE),
    "finetune-gpu": (
        "finetune",
        *FLOWERS,
        "name=flowers-gpu",
        "precision=bf16",
        "cluster.num_workers=8",
        "cluster.gpus_per_worker=1",
        IMAGE,
        "k8s.workers_per_pod=4",
        "k8s.worker_cpus=8",
        "k8s.worker_memory=32Gi",
        "k8s.queue=graftstack",
        "k8s.priority_class=graftstack-batch",
        "k8s.worker_nodes.nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3",
    ),
    "sweep-autoscaled-on-spot": (
        "sweep",
        *FLOWERS,
        "name=flowers-sweep",
        "space.freeze_depth=[2,4,all]",
        "space.lr=[1e-4,1e-3,1e-2]",
        IMAGE,
        "k8s.pods=[1,8]",
        "k8s.spot=true",
        "k8s.queue=graftstack",
    ),
    "stack-on-s3": (
        "stack",
        "data=parquet",
        "data.path=s3://bucket/adult.parquet",
        "data.label=income",
        "base_models=[LogisticRegression,ExtraTreesClassifier,HistGradientBoostingClassifier]",
        "name=adult",
        "runs_dir=s3://bucket/runs",
        IMAGE,
        "k8s.pods=4",
        "k8s.storage_claim=null",
        "k8s.env_from=[object-store]",
        "k8s.env.AWS_REGION=eu-central-1",
    ),
}


def rendered(name: str) -> str:
    words = ["submit", *COMMANDS[name], "--to", "k8s", "--dry-run"]
    with redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return f"# graftstack {shlex.join(words)}\n---\n{out.getvalue().removeprefix('---').lstrip()}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_is_rendered_as_it_was(name: str):
    golden = (FOLDER / f"{name}.yaml").read_bytes().decode()
    assert rendered(name) == golden, "if that is meant to change, record it anew: make rendered"


def test_nothing_else_is_called_a_rendered_job():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(COMMANDS)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for job in COMMANDS:
        (FOLDER / f"{job}.yaml").write_bytes(rendered(job).encode())
