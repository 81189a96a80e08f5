"""What jobs are promised in memory, against what real ones take: no more, and not much less."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftstack.config.compose import compose_job
from graftstack.finetune.memory import GIB, PROCESS_BYTES, DataFacts, JobMemory, training_memory
from graftstack.meta.memory import meta_memory
from graftstack.sweep.memory import Heads, sweep_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of the peak of resident memory in /proc"),
]

TWO_CLASSES = ("data.classes=[0,1]", "epochs=1")
SMALLEST = (*TWO_CLASSES, "backbone=conv4", "data.image_size=16", "batch_size=2", "data.num_train_per_class=2")

# What a process of the kind holds that does next to nothing.
BASES = {
    "finetune": ("finetune", *SMALLEST),
    "meta": ("finetune", *SMALLEST),
    "sweep": ("sweep", *SMALLEST, "freeze_depth=all", "space.lr=[1e-3,1e-2]"),
}

RATES = "space.lr=[1e-4,2e-4,5e-4,1e-3,2e-3,5e-3,1e-2,2e-2]"
# Small networks and large batches: activations are most of what a process holds.
JOBS = {
    "resnet18": (
        *("finetune", *TWO_CLASSES, "backbone=resnet18", "data.image_size=64", "batch_size=64"),
        "data.num_train_per_class=32",
    ),
    "cifar_resnet20": (
        *("finetune", *TWO_CLASSES, "backbone=cifar_resnet20", "batch_size=128", "data.num_train_per_class=64"),
    ),
    "conv4": ("finetune", *TWO_CLASSES, "backbone=conv4", "batch_size=128", "data.num_train_per_class=64"),
    "mobilenet_v2": (
        *("finetune", *TWO_CLASSES, "backbone=mobilenet_v2", "data.image_size=96", "batch_size=32"),
        *("data.num_train_per_class=16", "precision=bf16"),
    ),
    "maml": ("meta", "method=maml", "num_shots=5", "inner_steps=3", "num_episodes=3"),
    "prototypes": ("meta", "method=prototypes", "num_shots=5", "data.image_size=56", "num_episodes=3"),
    "heads": ("sweep", *TWO_CLASSES, "backbone=resnet18", "data.image_size=64", "freeze_depth=all", RATES),
    "depths": (
        *("sweep", *TWO_CLASSES, "backbone=resnet18", "data.image_size=64", "data.num_train_per_class=32"),
        *("space.lr=[1e-4,1e-3]", "space.freeze_depth=[1,2]"),
    ),
}

WIDE_HEADS = (
    *("heads", "backbone=conv4", "data.image_size=16", "freeze_depth=all", "epochs=2", "batch_size=8"),
    *("data.num_train_per_class=8", "optimizer.head_lr_multiplier=1"),
)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The resident memory of each job at its peak, in bytes."""
    program = Path(__file__).parents[1] / "unit" / "memory_in_truth.py"
    jobs = {**{f"base of {job}": words for job, words in BASES.items()}, **JOBS, "wide heads": WIDE_HEADS}
    arguments = [str(tmp_path_factory.mktemp("cache")), json.dumps(list(jobs.values()))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, str(program), *arguments], check=True, stdout=subprocess.PIPE, env=environment
    ).stdout
    return dict(zip(jobs, json.loads(found), strict=True))


def promised(job: str, *words: str) -> JobMemory:
    config: Any = compose_job(job, ["data=digits", *words, "name=a", "resume=true"])
    two = DataFacts(num_classes=2, num_val=72)
    if job == "meta":
        return meta_memory(config, DataFacts(num_classes=5, num_val=900))
    return sweep_memory(config, two) if job == "sweep" else training_memory(config, two)


@pytest.mark.parametrize("name", JOBS)
def test_a_real_job_takes_no_more_than_is_promised_and_not_far_less(name: str, peaks: dict[str, int]):
    job, *words = JOBS[name]
    memory = promised(job, *words)
    # In the process of a sweep without Ray are both its driver and its worker.
    most = max(memory.worker_bytes, memory.driver_bytes)
    assert peaks[name] < most
    # Beside what any process holds.
    assert 0.4 < (peaks[name] - peaks[f"base of {job}"]) / (most - PROCESS_BYTES) < 1


def test_heads_of_many_weights_take_no_more_than_is_said(peaks: dict[str, int]):
    heads = Heads(64, 4 * 10 * 16_385, num_slots=2, row_bytes=4 * 10, batch_size=8, num_val=64)
    assert 0.75 < (peaks["wide heads"] - peaks["base of finetune"]) / heads.resident_bytes < 1


@pytest.mark.parametrize(
    "backbone",
    ["convnext_tiny", "densenet121", "regnet_y_400mf", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32"],
)
def test_each_family_can_be_counted(backbone: str):
    words = (f"backbone={backbone}", "batch_size=4", "data.image_size=224")
    assert PROCESS_BYTES < promised("finetune", *words).worker_bytes < 20 * GIB


def test_second_derivatives_keep_every_inner_step_of_learnt_rates_too():
    words = ("method=meta_sgd", "num_shots=20", "num_queries=1", "eval.inner_steps=1")
    one, three, five = (promised("meta", *words, f"inner_steps={num}").worker_bytes for num in (1, 3, 5))
    assert three - one > 50 * 2**20
    assert five - three == pytest.approx(three - one, rel=0.2)


def test_episodes_at_once_take_more_than_one_after_another():
    words = ("method=anil", "episodes_per_step=8", "num_episodes=80")
    at_once, in_turn = (promised("meta", *words, f"execution={how}").worker_bytes for how in ("vmap", "loop"))
    assert at_once > 2 * in_turn
