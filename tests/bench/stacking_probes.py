"""Probes of one frozen backbone in all folds and refits: with a tap, and with a forward pass in each fold.

    python -m tests.bench.stacking_probes [--num-images 300] [--size 128] [--backbone resnet18] [--probes 5]

Both sides fit the same probes, which differ in their penalty, to the same folds, and predict what each holds out; one
side makes a tap first, the other has none. The images are real ones of the test data, enlarged. Decoding is done before
both clocks; the weights are random. One thread computes, as in a task of a stack. What both sides have in common, the
fits of the classifiers themselves, bounds the speed-up: the cheaper the forward pass, the more.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from tests.bench.sweep_speed import Table, images_file

from graftstack.config.compose import compose_job
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import TapsConfig
from graftstack.data.load import load_images
from graftstack.finetune.counting import counting_forwards
from graftstack.stacking.image_rows import ImageRows
from graftstack.stacking.probe_model import TapProbe
from graftstack.stacking.taps import make_taps
from graftstack.stacking.warm import lent_task

NUM_FOLDS = 5


def cross_fitted(probes: list[TapProbe], rows: ImageRows, y: np.ndarray) -> np.ndarray:
    """Returns the out-of-fold probabilities of all probes, [probes, N, C]; each is refitted on all rows too."""
    folds = list(StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0).split(np.zeros(len(y)), y))
    found = np.zeros((len(probes), len(y), len(np.unique(y))))
    for index, probe in enumerate(probes):
        for train, test in folds:
            fitted = clone(probe).fit(rows.take(train), y[train])
            found[index, test] = fitted.predict_proba(rows.take(test))
        clone(probe).fit(rows, y)
    return found


class Side:
    """One way to do it: its seconds, its predictions and its forwards."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.found = np.zeros(0)
        self.num_forwards = 0

    def run(self, config: FinetuneConfig, rows: ImageRows, y: np.ndarray, taps: TapsConfig | None, num: int) -> None:
        """Does all of it once, from nothing but decoded images and weights in memory."""
        penalties = np.logspace(-4, -2, num)
        probes = [TapProbe.of(config, LogisticRegression(C=float(c), max_iter=1000), taps) for c in penalties]
        with lent_task(probes[0].finetuning, rows.data) as task:
            backbone = task.model.backbone
        with counting_forwards(backbone, freeze_depth=backbone.num_groups) as count:
            began = time.perf_counter()
            make_taps(probes, rows)
            self.found = cross_fitted(probes, rows, y)
            self.seconds.append(time.perf_counter() - began)
        self.num_forwards = count.num_images


def main() -> None:
    """Runs both sides and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--probes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Runs both sides in turns, so that what else the machine does meets both."""
    images = images_file(folder, options.num_images)
    config = compose_job(
        "finetune",
        [
            *("data=parquet", f"data.path={images}", "data.image=image", f"data.image_size={options.size}"),
            *(f"data.cache_dir={folder}/cache", f"backbone={options.backbone}", "freeze_depth=all"),
        ],
    )
    data = load_images(config.data, image_size=options.size, seed=0)
    rows, y = ImageRows(data), data.labels
    ours, theirs = Side(), Side()
    for index in range(options.rounds):
        ours.run(config, rows, y, TapsConfig(location=f"{folder}/taps-{index}"), options.probes)
        theirs.run(config, rows, y, None, options.probes)
    table = Table(
        f"{options.probes} probes x ({NUM_FOLDS} folds + refit), {options.backbone}, {len(rows)} images of "
        f"{options.size} px, {torch.get_num_threads()} threads"
    )
    for name, side in (("taps", ours), ("a forward pass in each fold", theirs)):
        each = " ".join(f"{seconds:.2f}" for seconds in side.seconds)
        table.row(f"{name}, seconds (median)", f"{median(side.seconds):.2f}", each)
        table.row(f"{name}, images through the frozen part", f"{side.num_forwards:,}")
    table.row("speed-up", f"{median(theirs.seconds) / median(ours.seconds):.1f}", "target >= 20")
    table.row("largest difference of a probability", f"{np.abs(ours.found - theirs.found).max():.1e}", "target <= 1e-5")


if __name__ == "__main__":
    main()
