"""Seconds of a step of meta-learning, beside the loop that one would write by hand, and looped beside vectorised.

    python -m tests.bench.meta_speed [--steps 20] [--rounds 5] [--threads 1] [--device cpu]

Both sides draw the same kind of episodes from the same images in memory, and do the same work: a step of prototypical
networks (60 ways, 1 shot, 5 queries), and one of second-order MAML (four episodes of 5 ways, 1 shot, 15 queries, one
inner step). They take turns; the ratio of each pair, and its median, is what counts. The loop by hand is given
channels-last images as well, which is the quicker layout and the one that graftstack uses.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from tests.bench.measuring import Table, load_average
from torch import Tensor, nn

from graftstack.backbones.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from graftstack.backbones.registry import build
from graftstack.config.compose import compose_job
from graftstack.config.meta import MetaConfig
from graftstack.data.sources.png import encode_png
from graftstack.meta.crew import InlineCrew
from graftstack.meta.model import MetaModel
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.task import MetaTask, prepare_meta
from graftstack.meta.training import MetaTraining
from graftstack.storage import Folder

_NUM_CLASSES, _PER_CLASS, _SIZE = 160, 20, 28
_PROTOTYPES = ("method=prototypes", "train.num_ways=60", "num_queries=5")
_MAML = ("method=maml", "episodes_per_step=4", "inner_steps=1", "eval.batchnorm=transductive")


def made_up(folder: Path) -> None:
    """Writes random images of many classes."""
    generator = np.random.default_rng(0)
    num = _NUM_CLASSES * _PER_CLASS
    pixels = generator.integers(0, 256, (num, _SIZE, _SIZE, 3), dtype=np.uint8)
    images = [encode_png(Image.fromarray(image)) for image in pixels]
    labels = np.repeat(np.arange(_NUM_CLASSES), _PER_CLASS)
    pq.write_table(pa.table({"image": images, "label": labels}), folder / "images.parquet")


class Product:
    """The product's own outer loop in this process."""

    def __init__(self, folder: Path, num_steps: int, overrides: Sequence[str], device: str) -> None:
        per_step = next((int(word.partition("=")[2]) for word in overrides if word.startswith("episodes_per")), 1)
        config = compose_job(
            "meta",
            [
                *("data=parquet", f"data.path={folder}/images.parquet", "data.image=image"),
                *(f"data.cache_dir={folder}/cache", "cluster=inline", f"num_episodes={num_steps * per_step}"),
                *overrides,
            ],
        )
        assert isinstance(config, MetaConfig)
        self.task: MetaTask = prepare_meta(config)
        self._num_steps = num_steps
        self._model = MetaModel(config, image_size=_SIZE, num_classes=80, device=torch.device("cpu"))
        settings = RunnerSettings(
            config=config,
            classes=self.task.classes,
            images=self.task.data.images,
            preprocessing=self.task.preprocessing,
            device=device,
        )
        self._crew = InlineCrew(EpisodeRunner(settings))

    def step_s(self) -> float:
        """Returns the seconds of a step, one of so many, the checkpoint at the end included."""
        with tempfile.TemporaryDirectory() as checkpoints:
            training = MetaTraining(self.task, self._model, self._crew, Folder(checkpoints), validate=None)
            began = time.perf_counter()
            training.run()
            return (time.perf_counter() - began) / self._num_steps


class ByHand:
    """What both loops by hand share: images in memory, episodes drawn with NumPy."""

    def __init__(self, task: MetaTask, *, memory_format: torch.memory_format) -> None:
        self._pixels = task.data.images.batch(np.arange(len(task.data)))
        self._rows = np.stack([np.flatnonzero(task.data.labels == label) for label in range(_NUM_CLASSES)])
        self._format = memory_format
        self._mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255
        self._rng = np.random.default_rng(0)

    def images(self, ways: int, per_class: int) -> Tensor:
        """Returns the images of an episode, [ways, per_class, 3, S, S]."""
        classes = self._rng.choice(_NUM_CLASSES, ways, replace=False)
        columns = np.stack([self._rng.permutation(_PER_CLASS)[:per_class] for _ in range(ways)])
        images = self._pixels[torch.from_numpy(self._rows[classes[:, None], columns].ravel())]
        return images.float().sub_(self._mean).div_(self._std).contiguous(memory_format=self._format)


class PrototypesByHand(ByHand):
    """Prototypical networks as a module, a loss and an optimiser."""

    def run(self, num_steps: int) -> float:
        """Returns the seconds of a step."""
        torch.manual_seed(0)
        network = build("conv4").train().to(memory_format=self._format)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        labels = torch.arange(60).repeat_interleave(5)
        began = time.perf_counter()
        for _ in range(num_steps):
            features = network(self.images(60, 6)).unflatten(0, (60, 6))
            prototypes, queries = features[:, 0], features[:, 1:].flatten(0, 1)
            loss = F.cross_entropy(-torch.cdist(queries, prototypes).square(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - began) / num_steps


class MamlByHand(ByHand):
    """Second-order MAML on lists of weights, as its many ports to PyTorch have it."""

    def run(self, num_steps: int) -> float:
        """Returns the seconds of a step of four episodes."""
        torch.manual_seed(0)
        weights = self._weights()
        optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
        support_labels, query_labels = torch.arange(5), torch.arange(5).repeat_interleave(15)
        began = time.perf_counter()
        for _ in range(num_steps):
            optimizer.zero_grad()
            for _ in range(4):
                images = self.images(5, 16).unflatten(0, (5, 16))
                support, queries = (
                    part.flatten(0, 1).contiguous(memory_format=self._format) for part in (images[:, :1], images[:, 1:])
                )
                loss = F.cross_entropy(_conv4(support, weights), support_labels)
                slopes = torch.autograd.grad(loss, weights, create_graph=True)
                fast = [weight - 0.4 * slope for weight, slope in zip(weights, slopes, strict=True)]
                (F.cross_entropy(_conv4(queries, fast), query_labels) / 4).backward()
            optimizer.step()
        return (time.perf_counter() - began) / num_steps

    def _weights(self) -> list[Tensor]:
        network = build("conv4").model
        blocks = [getattr(network, f"block{index}") for index in range(1, 5)]
        found = [tensor for block in blocks for tensor in (*block.conv.parameters(), *block.norm.parameters())]
        return [nn.Parameter(tensor.detach().clone()) for tensor in (*found, *nn.Linear(64, 5).parameters())]


def _conv4(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for start in range(0, 16, 4):
        kernel, bias, scale, shift = weights[start : start + 4]
        x = F.conv2d(x, kernel, bias, padding=1)
        x = F.max_pool2d(F.relu(F.batch_norm(x, None, None, scale, shift, training=True)), 2)
    return F.linear(x.flatten(1), weights[16], weights[17])


def compare(title: str, sides: dict[str, Callable[[], float]], *, rounds: int, target: str) -> None:
    """Lets the sides take turns, and prints the medians and the ratios to the first of them."""
    table = Table(f"{title}, {load_average()}")
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            seconds = work()
            if number:  # the first round warms up
                taken[name].append(seconds)
    first, *others = sides
    for name in sides:
        table.row(name, f"{1e3 * median(taken[name]):.1f} ms a step")
    for name in others:
        ratio = median(ours / theirs for ours, theirs in zip(taken[first], taken[name], strict=True))
        table.row(f"{first} / {name}", f"{ratio:.3f}", target)


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the comparison of loop and vmap")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = options.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up(folder)
        formats = {"by hand": torch.contiguous_format, "by hand, channels last": torch.channels_last}
        for title, overrides, by_hand in (
            ("prototypes, 60 ways", _PROTOTYPES, PrototypesByHand),
            ("MAML, 4 episodes", _MAML, MamlByHand),
        ):
            product = Product(folder, steps, overrides, "cpu")
            loops = {name: by_hand(product.task, memory_format=layout) for name, layout in formats.items()}
            sides = {"graftstack": product.step_s}
            sides |= {name: lambda loop=loop: loop.run(steps) for name, loop in loops.items()}
            compare(title, sides, rounds=options.rounds, target="target <= 1.1")
        each = {
            execution: Product(folder, steps, (*_MAML, f"execution={execution}"), options.device).step_s
            for execution in ("loop", "vmap")
        }
        compare(f"MAML on {options.device}", each, rounds=options.rounds, target="below 1: loop is quicker")


if __name__ == "__main__":
    main()
