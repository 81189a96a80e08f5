"""The learning curves of small meta-trainings: a change that isn't meant to move numbers doesn't move these.

To record new ones, after a change that is: python tests/golden/test_meta_losses.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.meta.crew import InlineCrew
from graftstack.meta.job import MetaJob
from graftstack.meta.model import MetaModel
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.task import prepare_meta
from graftstack.storage import Folder

GOLDEN = Path(__file__).with_name("meta_losses.json")
COMMON = (
    "data=digits",
    "data.image_size=16",
    "backbone=conv4",
    "num_ways=2",
    "num_queries=5",
    "num_episodes=24",
    "episodes_per_step=2",
    "eval.every_episodes=8",
    "eval.num_episodes=50",
    "cluster=inline",
)
TRAININGS = {
    "prototypes": ("train.num_ways=4", "eval.num_shots=[5]"),
    "supcon": ("method=supcon", "num_shots=2", "temperature=0.2"),
    "maml": ("method=maml", "inner_lr=0.02", "inner_steps=2", "eval.batchnorm=transductive", "optimizer.lr=3e-4"),
    "reptile": ("method=reptile", "inner_lr=0.05", "inner_steps=3", "num_shots=3", "inner_batch_size=4"),
}


def curve(name: str, folder: Path) -> list[dict[str, Any]]:
    """Returns the losses of a training, and in the last row its accuracy on held-out classes."""
    config = compose_job("meta", [*COMMON, *TRAININGS[name]])
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    size, num_classes, device = task.preprocessing.image_size, len(task.classes.train), torch.device("cpu")
    model = MetaModel(config, image_size=size, num_classes=num_classes, device=device)
    settings = RunnerSettings(
        config=config, classes=task.classes, images=task.data.images, preprocessing=task.preprocessing
    )
    outcome = MetaJob(task, model, InlineCrew(EpisodeRunner(settings)), Folder(folder)).run()
    return [*outcome.results["curve"], outcome.metrics]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_numbers_have_not_moved(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    *found, metrics = curve(name, tmp_path)
    *expected, final = golden
    assert [row["episode"] for row in found] == [row["episode"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        # Processors add up in different orders; what a changed algorithm moves is far larger.
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=2e-2)
    assert metrics.keys() == final.keys()
    assert metrics["accuracy"] == pytest.approx(final["accuracy"], abs=2e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        recorded = {name: curve(name, Path(root) / name) for name in TRAININGS}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
