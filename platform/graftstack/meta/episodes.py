"""Episodes: few-shot tasks drawn from many classes, each a pure function of the seed and its number."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graftstack.config.meta import MetaConfig
from graftstack.meta.classes import Classes
from graftstack.seeding import derive_seed


class EpisodeShape(NamedTuple):
    """How large an episode is."""

    num_ways: int
    """Classes."""
    num_shots: int
    """Support images of each."""
    num_queries: int
    """Query images of each."""


class Episode(NamedTuple):
    """A few classes, and of each of them a few images; no class and no image of a class twice."""

    classes: npt.NDArray[np.int64]
    """``[ways]``: positions in `Classes`."""
    rows: npt.NDArray[np.int64]
    """``[ways, shots + queries]``: rows of `ImageData`, the support images first."""
    turns: npt.NDArray[np.int64]
    """``[ways]``: quarter turns of the images of each class."""
    num_shots: int


class EpisodeSampler:
    """Draws episodes from `classes`, all classes alike, and all images of a class alike.

    Args:
        classes: At least `shape.num_ways`, and of each at least as many images as it takes.
        shape: How large an episode is.
        seed: Of all episodes.
        part: What the episodes are for, e.g. ``train``: each has a random stream of its own.
    """

    def __init__(self, classes: Classes, shape: EpisodeShape, *, seed: int, part: str) -> None:
        self._classes, self._shape, self._seed, self._part = classes, shape, seed, part

    def episode(self, index: int) -> Episode:
        """Returns an episode: a function of classes, shape, seed, part and `index` alone."""
        known, shape = self._classes, self._shape
        rng = np.random.default_rng(derive_seed(self._seed, "episode", self._part, *shape, index))
        classes = rng.choice(len(known), shape.num_ways, replace=False)
        positions = _distinct(rng, known.counts[classes], shape.num_shots + shape.num_queries)
        return Episode(classes, known.rows[classes[:, None], positions], known.turns[classes], shape.num_shots)


def training_shape(config: MetaConfig) -> EpisodeShape:
    """Returns the shape of training episodes."""
    train = config.train
    return EpisodeShape(
        train.num_ways or config.num_ways, train.num_shots or config.num_shots, train.num_queries or config.num_queries
    )


def _distinct(rng: np.random.Generator, counts: npt.NDArray[np.int64], num: int) -> npt.NDArray[np.int64]:
    """Returns `num` numbers out of ``0..counts[i] - 1`` for each i, none twice, in random order: [len(counts), num].

    Floyd's algorithm (Bentley and Floyd 1987, A sample of brilliance), for all i at once: its cost doesn't depend on
    the counts.
    """
    chosen = np.empty((len(counts), num), dtype=np.int64)
    draws = rng.random((num, len(counts)))
    for position, draw in enumerate(draws):
        last = counts - num + position
        candidate = (draw * (last + 1)).astype(np.int64)
        is_taken = (chosen[:, :position] == candidate[:, None]).any(axis=1)
        chosen[:, position] = np.where(is_taken, last, candidate)
    return rng.permuted(chosen, axis=1)
