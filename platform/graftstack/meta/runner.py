"""One process's share of meta-learning: it holds the images, is told the state, and goes through episodes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.meta import MetaConfig
from graftstack.data.images import Images
from graftstack.errors import TrainingError
from graftstack.finetune.inference import inference_batch_size
from graftstack.meta.classes import ClassSplit
from graftstack.meta.episode_images import EpisodeBatch, EpisodeImages
from graftstack.meta.episodes import EpisodeSampler, EpisodeShape, training_shape
from graftstack.meta.gradients import (
    Embedded,
    EpisodeGradients,
    as_leaves,
    embed,
    looped,
    of_embeddings,
    pulled_back,
    vectorised,
)
from graftstack.meta.inner_loop import diverged_step
from graftstack.meta.methods.inner_defaults import inner_settings
from graftstack.meta.model import Floats, MetaModel, MetaState
from graftstack.meta.network import Params
from graftstack.meta.scoring import Score, score


class Block(NamedTuple):
    """Consecutive episodes, ``start..stop-1``, which one process goes through in order."""

    start: int
    stop: int


class BlockGradient(NamedTuple):
    """What the training episodes of a block say about the meta-parameters."""

    gradient: Floats
    """Their meta-gradients added up in order, [P]."""
    losses: list[float]
    accuracies: list[float]
    moments: list[Floats]
    """The means and variances that BatchNorm saw in each, [S]; none where the method adapts."""


class BlockFeatures(NamedTuple):
    """The features of all images of a block of training episodes."""

    features: Floats
    """[N, D], the images of one episode after those of another."""
    classes: npt.NDArray[np.int64]
    """Of each image, [N]: positions among the classes of training."""
    moments: list[Floats]
    """As in `BlockGradient`."""


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """What a runner is made of."""

    config: MetaConfig
    classes: ClassSplit
    images: Images
    preprocessing: Preprocessing
    device: str = "cpu"


class EpisodeRunner:
    """Goes through episodes. All that it returns is a pure function of its settings and of what it is given."""

    def __init__(self, settings: RunnerSettings) -> None:
        config = self.config = settings.config
        self.device = torch.device(settings.device)
        self.model = MetaModel(
            config,
            image_size=settings.preprocessing.image_size,
            num_classes=len(settings.classes.train),
            device=self.device,
        )
        self._classes = settings.classes
        self._images = EpisodeImages(settings.images, settings.preprocessing, self.device)
        self._kept: dict[Block, tuple[Params, list[Embedded]]] = {}
        """The graphs of a step's features, until the gradients by them come back."""

    def gradient(self, state: MetaState, block: Block) -> BlockGradient:
        """Returns the sum of the meta-gradients of a block's training episodes.

        Raises:
            TrainingError: an inner loop diverged, or a loss isn't finite.
        """
        params, statistics = self.model.parameters(state), self.model.statistics(state)
        batches = self._batches(block)
        if self.config.method.adapts:
            adapt = vectorised if self.config.is_vectorised else looped
            with self.model.arithmetic():
                found = adapt(self.model.adapting, params, statistics, batches)
        else:
            found = of_embeddings(self.model, params, statistics, batches)
        self._check_finite(found, block)
        return BlockGradient(
            self.model.flat_parameters(found.total),
            [float(loss) for loss in found.losses],
            [float(accuracy) for accuracy in found.accuracies],
            [self.model.flat_statistics(moments) for moments in found.moments],
        )

    def embed(self, state: MetaState, block: Block) -> BlockFeatures:
        """Returns the features of a block's training episodes, for a loss over those of all blocks of the step."""
        self._kept = {kept: graph for kept, graph in self._kept.items() if self._step_of(kept) == self._step_of(block)}
        _, embedded = self._kept[block] = self._embedded(state, block)
        return BlockFeatures(
            torch.cat([part.features.detach() for part in embedded]).cpu().numpy(),
            torch.cat([part.classes for part in embedded]).cpu().numpy(),
            [self.model.flat_statistics(part.moments) for part in embedded],
        )

    def pull_back(self, state: MetaState, block: Block, slopes: Floats) -> Floats:
        """Returns the gradient by the meta-parameters, [P], of a loss over features.

        Args:
            state: As it was given to `embed`.
            block: As well. Another process may have embedded it.
            slopes: The gradient of the loss by the features of the block, [N, D].
        """
        leaves, embedded = self._kept.pop(block) if block in self._kept else self._embedded(state, block)
        found = pulled_back(leaves, embedded, torch.tensor(slopes, device=self.device))
        return self.model.flat_parameters(found)

    @torch.no_grad()
    def moments(self, state: MetaState, block: Block) -> list[Floats]:
        """Returns the means and variances that BatchNorm sees in each training episode of a block, [S]."""
        _, embedded = self._embedded(state, block)
        return [self.model.flat_statistics(part.moments) for part in embedded]

    def score(self, state: MetaState, part: str, shape: EpisodeShape, block: Block) -> list[Score]:
        """Returns how many queries are classified rightly in each episode of a block, learning from its support set.

        Args:
            state: The meta-parameters.
            part: train, val or test: whose classes.
            shape: Of the episodes.
            block: Which of them.
        """
        params, statistics = self.model.parameters(state), self.model.statistics(state)
        sampler = EpisodeSampler(getattr(self._classes, part), shape, seed=self.config.seed, part=part)
        batches = (self._images.batch(sampler.episode(index)) for index in range(*block))
        return [score(self.model, params, statistics, batch) for batch in batches]

    @torch.no_grad()
    def features(self, state: MetaState, rows: npt.NDArray[np.int64], turns: npt.NDArray[np.int64]) -> Floats:
        """Returns the features of images, normalised with the running statistics: [N, D].

        Args:
            state: The meta-parameters.
            rows: Of the images, [N].
            turns: By how many quarters each is turned, [N].
        """
        params, statistics = self.model.parameters(state), self.model.statistics(state)
        size = inference_batch_size(self.model.image_size)
        pieces = []
        for begin in range(0, len(rows), size):
            images = self._images.items(rows[begin : begin + size], turns[begin : begin + size])
            pieces.append(self.model.features(params, statistics, images).cpu())
        return torch.cat(pieces).numpy()

    def _batches(self, block: Block) -> Iterator[EpisodeBatch]:
        config = self.config
        sampler = EpisodeSampler(self._classes.train, training_shape(config), seed=config.seed, part="train")
        return (self._images.batch(sampler.episode(index)) for index in range(*block))

    def _embedded(self, state: MetaState, block: Block) -> tuple[Params, list[Embedded]]:
        leaves, statistics = as_leaves(self.model.parameters(state)), self.model.statistics(state)
        return leaves, [embed(self.model, leaves, statistics, batch) for batch in self._batches(block)]

    def _step_of(self, block: Block) -> int:
        return block.start // self.config.episodes_per_step

    def _check_finite(self, found: EpisodeGradients, block: Block) -> None:
        inner = found.inner_losses or [torch.empty(0)] * len(found.losses)
        for episode, (before, after) in enumerate(zip(inner, found.losses, strict=True), start=block.start):
            losses = [*before.tolist(), float(after)]
            num_steps = diverged_step(losses)
            if num_steps:
                raise TrainingError(
                    f"inner_lr={inner_settings(self.config).lr:g}: the inner loop of episode {episode} diverged at its "
                    f"step {num_steps} (loss {losses[num_steps]}); lower it"
                )
            if num_steps == 0:
                raise TrainingError(
                    f"optimizer.lr={self.config.optimizer.lr:g}: the loss of episode {episode} is {losses[0]}; lower "
                    "it, or set clip_grad_norm"
                )
