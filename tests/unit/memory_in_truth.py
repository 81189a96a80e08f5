"""Runs jobs, each in a process of its own, and prints the resident memory that each took at its peak, in bytes.

A program: ``python memory_in_truth.py CACHE_DIR '[["finetune", "backbone=conv4"], ...]'``. Its processes are forks of
one, with one thread each.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import FinetuneConfig
from graftstack.config.sweep import SweepConfig
from graftstack.finetune.task import Task, Workbench, prepare
from graftstack.storage import Folder


class WideFeatures(NamedTuple):
    """Stands for a tap of any number of features."""

    values: torch.Tensor
    boundary: int

    def training(self, rows: Any, *, epoch: int) -> torch.Tensor:
        return self.plain(rows)

    def plain(self, rows: Any) -> torch.Tensor:
        return self.values[torch.arange(len(rows)) % len(self.values)]

    def prepared(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        return values


def wide_tasks(config: FinetuneConfig, *, num_heads: int, num_features: int, num_val: int) -> dict[int, Task]:
    """Trainings of heads on so many features, which validate on so many images."""
    bench, tasks = Workbench(), {}
    for index in range(num_heads):
        task = bench.task(config)
        task.model.head = nn.Linear(num_features, len(task.data.class_names))
        tap = WideFeatures(torch.ones(8, num_features), task.model.head_boundary)
        splits = task.data.splits._replace(val=np.resize(task.data.splits.val, num_val))
        tasks[index] = replace(task, tap=tap, data=replace(task.data, splits=splits))
    return tasks


def train(config: FinetuneConfig, folder: str) -> None:
    from graftstack.cluster.train import train_inline

    train_inline(prepare(config), Folder(folder), lambda _: None)


def train_heads(config: FinetuneConfig, folder: str) -> None:
    """64 of 16,384 features."""
    from graftstack.sweep.fused import FusedTraining

    tasks = wide_tasks(config, num_heads=64, num_features=16_384, num_val=64)
    fused = FusedTraining(tasks, torch.device("cpu"), Folder(folder))
    for _ in fused.epochs():
        pass
    fused.finish(fused.indices)


def learn_episodes(config: MetaConfig, _: str) -> None:
    """A few steps of the outer loop, and a few episodes of evaluation."""
    from graftstack.meta.evaluation import Evaluation
    from graftstack.meta.inline import inline_crew
    from graftstack.meta.job import table_shapes
    from graftstack.meta.model import MetaModel
    from graftstack.meta.steps import gradient_of_step
    from graftstack.meta.task import prepare_meta

    task = prepare_meta(config)
    crew = inline_crew(task)
    device = torch.device("cpu")
    model = MetaModel(
        config, image_size=task.preprocessing.image_size, num_classes=len(task.classes.train), device=device
    )
    state = model.initial(task.backbone)
    for step in range(3):
        gradient_of_step(step, state, model, crew)
    Evaluation(model, crew, task.classes.test, "test").measure(state, table_shapes(config), num_episodes=2)


def search_space(config: SweepConfig, folder: str) -> None:
    from graftstack.cluster.sweep import launch_sweep
    from graftstack.report.console import plain_console
    from graftstack.report.sweep_progress import sweep_display

    config = replace(config, taps=replace(config.taps, location=f"{folder}/taps"))
    with sweep_display(plain_console(stderr=True)) as display:
        launch_sweep(config, overrides=[], display=display)


_RUN: dict[str, tuple[str, Callable[..., None]]] = {
    "finetune": ("finetune", train),
    "heads": ("finetune", train_heads),
    "meta": ("meta", learn_episodes),
    "sweep": ("sweep", search_space),
}
"""The kind of a configuration, and what is done with it."""


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def peak_of(name: str, words: Sequence[str]) -> int:
    """Runs a job in a process of its own."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            torch.set_num_threads(1)
            job, run = _RUN[name]
            with tempfile.TemporaryDirectory() as folder:
                run(compose_job(job, [*words, f"runs_dir={folder}", "name=a", "cluster=inline"]), folder)
            os.write(writing, str(peak_bytes()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read()
    os.wait()
    return int(found)


if __name__ == "__main__":
    cache_dir, jobs = sys.argv[1:]
    shared = [f"data.cache_dir={cache_dir}", "cluster.cpus_per_worker=1", "data=digits"]
    print(json.dumps([peak_of(name, [*shared, *words]) for name, *words in json.loads(jobs)]))
