"""The losses of a small training, step for step: a change that isn't meant to move numbers doesn't move these.

To record new ones, after a change that is: python tests/golden/test_losses.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from graftstack.config.compose import compose_job
from graftstack.finetune.task import prepare
from graftstack.finetune.training import Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder

GOLDEN = Path(__file__).with_name("losses.json")
COMMON = (
    "data=digits",
    "data.image_size=16",
    "data.num_train_per_class=16",
    "data.val_fraction=0.06",
    "backbone=conv4",
    "epochs=3",
    "batch_size=32",
    "cluster=inline",
)
TRAININGS = {
    "plain": ("optimizer.layer_decay=0.7",),
    "lp_ft": ("recipe=lp_ft", "freeze_depth=2", "label_smoothing=0.1"),
    "gradual_unfreeze": ("recipe=gradual_unfreeze", "optimizer=sgd", "schedule=one_cycle", "augment=standard"),
}


def losses(name: str, folder: Path) -> list[dict[str, float]]:
    task = prepare(compose_job("finetune", [*COMMON, *TRAININGS[name]]))
    return [dict(row) for row in Training(task, LocalWorker(), Folder(folder)).run().history]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_numbers_have_not_moved(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    found = losses(name, tmp_path)
    assert len(found) == len(golden)
    for row, expected in zip(found, golden, strict=True):
        # Processors add up in different orders; what a changed algorithm moves is far larger.
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=5e-3)
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        recorded = {name: losses(name, Path(root) / name) for name in TRAININGS}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
