"""Samples per second of graftstack's loop in this process, beside a plain PyTorch loop of the same model and batch.

    python -m tests.bench.training_speed [--model cifar_resnet20] [--num-images 1536] [--size 32] [--rounds 5]

Both sides train the same network on the same images in turn, each in a process of its own, since ours sets how its
process keeps memory; the ratio of each pair, and its median, is what counts. Neither side's validation, checkpoints or
start are timed.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tests.bench.measuring import write_images
from torch.utils.data import DataLoader, TensorDataset

from graftstack.backbones import registry
from graftstack.config.compose import compose_job
from graftstack.finetune.task import Task, prepare
from graftstack.finetune.training import Progress, Training
from graftstack.runtime import LocalWorker
from graftstack.storage import Folder

# Both clocks run from this step to the last: caches are warm by then.
_FIRST_STEP = 10


def prepared(options: argparse.Namespace, folder: Path) -> Task:
    """Returns a training of one epoch on random images of two classes."""
    data = write_images(folder, num_images=options.num_images, size=options.size)
    training = [f"backbone={options.model}", f"batch_size={options.batch_size}", "epochs=1", "cluster=inline"]
    return prepare(compose_job("finetune", [*data, *training]))


def graftstack_speed(options: argparse.Namespace, folder: Path) -> float:
    """Returns images per second of the product's own loop."""
    task = prepared(options, folder)
    seen: list[tuple[int, float]] = []

    def look(progress: Progress) -> None:
        if progress.step % _FIRST_STEP == 0 and not progress.history:
            seen.append((progress.step, time.perf_counter()))

    with tempfile.TemporaryDirectory() as checkpoints:
        Training(task, LocalWorker(), Folder(checkpoints), on_progress=look).run()
    (first, began), (last, ended) = seen[0], seen[-1]
    return (last - first) * options.batch_size / (ended - began)


def plain_speed(options: argparse.Namespace, folder: Path) -> float:
    """Returns images per second of the loop that one would write by hand: images in memory, AdamW, a cosine."""
    task = prepared(options, folder)
    rows = task.data.splits.train
    images = task.data.images.batch(rows).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (task.preprocessing.mean, task.preprocessing.std))
    dataset = TensorDataset((images - mean) / std, torch.from_numpy(task.data.labels[rows]))
    loader = DataLoader(dataset, batch_size=options.batch_size, shuffle=True, drop_last=True)
    model = task.model
    model.backbone.freeze(0)  # the recipe decides which groups train, and none does before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader))
    model.train()
    began = ended = 0.0
    last = len(loader) // _FIRST_STEP * _FIRST_STEP
    for step, (batch, labels) in enumerate(loader, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        scheduler.step()
        if step == _FIRST_STEP:
            began = time.perf_counter()
        if step == last:
            ended = time.perf_counter()
    return (last - _FIRST_STEP) * options.batch_size / (ended - began)


def leave_memory_alone() -> None:
    """Lets this process's memory be as torch has it where nobody sets anything."""
    registry.keep_freed_memory = lambda: None


def main() -> None:
    """Runs both sides in turn and prints a row for each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--num-images", type=int, default=3000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.model}, {options.size} px, batch {options.batch_size}, {torch.get_num_threads()} threads")
    print(f"{'round':>6} {'graftstack':>12} {'plain':>12} {'ratio':>8}   images/s")
    pairs = []
    fresh = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, fresh) as ours_runs,
        ProcessPoolExecutor(1, fresh, initializer=leave_memory_alone) as plain_runs,
    ):
        for number in range(options.rounds + 1):
            pair = (
                ours_runs.submit(graftstack_speed, options, Path(folder)).result(),
                plain_runs.submit(plain_speed, options, Path(folder)).result(),
            )
            if number:  # the first round warms up
                pairs.append(pair)
                print(f"{number:>6} {pair[0]:>12.1f} {pair[1]:>12.1f} {pair[0] / pair[1]:>8.3f}")
    ours, plain = (median(side) for side in zip(*pairs, strict=True))
    print(f"{'median':>6} {ours:>12.1f} {plain:>12.1f} {median(a / b for a, b in pairs):>8.3f}   target >= 0.95")


if __name__ == "__main__":
    main()
