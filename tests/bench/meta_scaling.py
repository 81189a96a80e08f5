"""Steps of a crew of workers: how far from the best possible they are, what they cost, and what images take.

    python -m tests.bench.meta_scaling [real] [sleeping] [overhead] [memory] [--rounds 20]

- real: steps of prototypical networks and of MAML, in this process and on as many workers as there are CPUs, with a
  thread each; their gradients are to be the same to the bit.
- sleeping: blocks that take no CPU, so that eight workers need no eight CPUs, beside the time below which none can end.
- overhead: what a step of blocks that do nothing takes, by what travels with them.
- memory: what an array of images takes in each process that has read all of it.

Workers are started, and have gone through a step, before all clocks.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from tests.bench.measuring import Table, load_average, running_ray, timed
from tests.bench.meta_speed import made_up

from graftstack.cluster.crew import RayCrew
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.machine import usable_cpus
from graftstack.meta.crew import Crew, InlineCrew
from graftstack.meta.model import MetaModel
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.steps import gradient_of_step
from graftstack.meta.task import prepare_meta

MOST_WORKERS = 8
NUM_BLOCKS, BLOCK_S = 32, 0.05
STATE = np.zeros(112_500, np.float32)
"""As large as the parameters of conv4."""
MIB = 2**20


class Idler:
    """A runner that sleeps, or not even that."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def sleep(self, seconds: float) -> int:
        """Returns the process that slept."""
        time.sleep(seconds)
        return os.getpid()

    def long_result(self, _: np.ndarray, seconds: float) -> np.ndarray:
        """Sleeps, and returns as much as a gradient."""
        time.sleep(seconds)
        return STATE

    def nothing(self, *_: Any) -> None:
        """Takes what there is."""

    def read(self) -> int:
        """Reads all images, and returns the process that did."""
        self.images.sum()
        return self.sleep(0.2)


class Episodic(EpisodeRunner):
    """A runner of real episodes that can sleep as well."""

    sleep = Idler.sleep


@contextmanager
def crew_of(num_workers: int, make_runner: Callable[[], Any]) -> Iterator[RayCrew]:
    """Starts a crew on the running Ray, and waits until all of it is there."""
    crew = RayCrew(make_runner, num_workers=num_workers, num_cpus=1, num_threads=1, max_losses=0)
    try:
        while len(set(crew.call("sleep", [[0.1]] * 2 * num_workers))) < num_workers:
            pass
        yield crew
    finally:
        crew.close()


def step_s(step: Callable[[], Any], rounds: int) -> list[float]:
    """Returns what a step takes, each time."""
    step()
    return [timed(step).seconds for _ in range(rounds)]


def shown(seconds: list[float]) -> str:
    """Returns the fastest and the slowest in milliseconds."""
    return f"{1e3 * min(seconds):.1f} .. {1e3 * max(seconds):.1f}"


def real(options: argparse.Namespace) -> None:
    """Steps as a training takes them, on made-up images."""
    with tempfile.TemporaryDirectory() as folder:
        made_up(Path(folder))
        for name, overrides in (
            ("prototypes, 16 episodes of 20 ways", ["method=prototypes", "train.num_ways=20", "num_queries=5"]),
            ("maml, 16 episodes of 5 ways", ["method=maml", "inner_steps=1", "eval.batchnorm=transductive"]),
        ):
            compare(name, [*overrides, "episodes_per_step=16", "num_episodes=1600"], Path(folder), options.rounds)


def compare(name: str, overrides: list[str], folder: Path, rounds: int) -> None:
    """Takes the same step everywhere."""
    table = Table(f"{name} a step, {rounds} steps, {load_average()}")
    data = ["data=parquet", f"data.path={folder}/images.parquet", "data.image=image", f"data.cache_dir={folder}/cache"]
    config = compose_job("meta", [*data, *overrides])
    assert isinstance(config, MetaConfig)
    task = prepare_meta(config)
    settings = RunnerSettings(
        config=config, classes=task.classes, images=task.data.images, preprocessing=task.preprocessing
    )
    model = MetaModel(
        config,
        image_size=task.preprocessing.image_size,
        num_classes=len(task.classes.train),
        device=torch.device("cpu"),
    )
    state = model.initial(task.backbone)
    found = {}

    def measure(name: str, crew: Crew) -> float:
        found[name] = gradient_of_step(0, state, model, crew).gradient.tobytes()
        seconds = step_s(lambda: gradient_of_step(0, state, model, crew), rounds)
        table.row(f"{name}, ms a step (median)", f"{1e3 * median(seconds):.1f}", shown(seconds))
        return median(seconds)

    alone_s = measure("this process", InlineCrew(EpisodeRunner(settings)))
    for num in range(1, usable_cpus() + 1):
        with crew_of(num, partial(Episodic, settings)) as crew:
            workers_s = measure(f"{num} workers", crew)
        table.row(f"{num} workers, this process / {num} / measured", f"{alone_s / num / workers_s:.3f}")
    table.row("gradients that differ", str(len(set(found.values())) - 1), "target 0")


def sleeping(options: argparse.Namespace) -> None:
    """1, 2, 4 and 8 workers on the same blocks."""
    table = Table(
        f"scaling: {NUM_BLOCKS} sleeping blocks of {1e3 * BLOCK_S:.0f} ms a step, {options.rounds} steps, "
        f"{load_average()}; the state is {STATE.nbytes / 1e3:.0f} kB, and so is a gradient"
    )
    for num in (1, 2, 4, MOST_WORKERS):
        ideal_s = NUM_BLOCKS * BLOCK_S / num
        with crew_of(num, partial(Idler, STATE)) as crew:
            for name, method, shared in (("alone", "sleep", ()), ("with state and gradients", "long_result", (STATE,))):
                step = partial(crew.call, method, [[BLOCK_S]] * NUM_BLOCKS, shared=shared)
                seconds = step_s(step, options.rounds)
                table.row(f"{num} workers, {name}, ms a step (median)", f"{1e3 * median(seconds):.1f}", shown(seconds))
                target = "target >= 0.85" if num == MOST_WORKERS and not shared else ""
                table.row(f"{num} workers, {name}, best / measured", f"{ideal_s / median(seconds):.3f}", target)


def overhead(options: argparse.Namespace) -> None:
    """Eight blocks on two workers."""
    rounds = 5 * options.rounds
    table = Table(f"overhead: 8 blocks that do nothing, 2 workers, {rounds} steps, {load_average()}")
    size = f"{STATE.nbytes / 1e3:.0f} kB"
    with crew_of(2, partial(Idler, STATE)) as crew:
        for name, method, args, shared, target in (
            ("nothing travels", "nothing", [], (), ""),
            (f"a state of {size}", "nothing", [], (STATE,), "target <= 10,"),
            (f"a state of {size} and as long gradients", "long_result", [0], (STATE,), ""),
        ):
            seconds = step_s(partial(crew.call, method, [args] * 8, shared=shared), rounds)
            table.row(f"{name}, ms a step (median)", f"{1e3 * median(seconds):.1f}", f"{target} {shown(seconds)}")


def memory(_: argparse.Namespace) -> None:
    """Four workers on one node, which have read small and large images."""
    num = 4
    table = Table(f"memory: what a worker that has read all images has for itself, mean of {num} on one node")
    found = {}
    for size in (1, 200):
        with crew_of(num, partial(Idler, np.ones(size * MIB, np.uint8))) as crew:
            pids = set(crew.call("read", [[]] * 2 * num))
            assert len(pids) == num
            found[size] = sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / num / MIB
        table.row(f"{size} MiB of images, MiB", f"{found[size]:.1f}")
    table.row("more of it for 199 MiB more of images, MiB", f"{found[200] - found[1]:.1f}", "target <= 10")


PARTS = {"real": real, "sleeping": sleeping, "overhead": overhead, "memory": memory}


def main() -> None:
    """Runs the parts that are asked for, all unless any is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}; use {', '.join(PARTS)}")
    with running_ray(MOST_WORKERS):
        for name in options.parts or PARTS:
            PARTS[name](options)


if __name__ == "__main__":
    main()
