"""Few-shot accuracy, over many episodes, with its confidence interval."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from graftstack.config.meta import BatchNormMode
from graftstack.meta.classes import Classes
from graftstack.meta.crew import Crew
from graftstack.meta.episodes import Episode, EpisodeSampler, EpisodeShape
from graftstack.meta.model import Floats, MetaModel, MetaState
from graftstack.meta.runner import Block
from graftstack.meta.scoring import Score, score_features

# Episodes that a worker scores, and images that it embeds, at a time: enough to be worth the call.
_BLOCK_EPISODES = 10
_BLOCK_IMAGES = 2048

# Of a normal distribution, 95 % lies within so many standard deviations of its mean.
_Z95 = 1.96


class Rows(NamedTuple):
    """Images, each turned by some quarters."""

    rows: npt.NDArray[np.int64]
    turns: npt.NDArray[np.int64]


class Measured(NamedTuple):
    """Accuracy for one number of ways and shots."""

    num_ways: int
    num_shots: int
    num_queries: int
    batchnorm: str
    """inductive or transductive."""
    accuracy: float
    """The mean over the episodes."""
    ci95: float
    """Half the width of its 95 % confidence interval."""
    nearest_neighbour: float | None
    """The mean accuracy of nearest neighbours in the features; None where the method adapts."""
    num_episodes: int
    num_diverged: int
    """Episodes whose inner loop diverged; they count with what it guessed."""

    @property
    def shape(self) -> EpisodeShape:
        """Of the episodes."""
        return EpisodeShape(self.num_ways, self.num_shots, self.num_queries)


class Evaluation:
    """Measures states on the classes of one part.

    Args:
        model: The method.
        crew: Goes through episodes and images.
        classes: Of the part.
        part: train, val or test.
        features_of: What embeds images in place of the crew, if their features are known.
        tell: Called with (episodes scored, episodes in all).
    """

    def __init__(
        self,
        model: MetaModel,
        crew: Crew,
        classes: Classes,
        part: str,
        *,
        features_of: Callable[[Rows], Floats] | None = None,
        tell: Callable[[int, int], None] = lambda _, __: None,
        poll: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._crew = crew
        self._classes = classes
        self._part = part
        self._features_of = features_of
        self._tell = tell
        self._poll = poll

    def measure(self, state: MetaState, shapes: Sequence[EpisodeShape], *, num_episodes: int) -> list[Measured]:
        """Returns the accuracy for each shape; the episodes are the same at each call."""
        if self._model.config.is_by_features:
            scores = self._by_features(state, shapes, num_episodes)
        else:
            scores = [self._by_episodes(state, shape, num_episodes) for shape in shapes]
        return [
            measured(shape, self._model.config.eval.batchnorm, found)
            for shape, found in zip(shapes, scores, strict=True)
        ]

    def _by_episodes(self, state: MetaState, shape: EpisodeShape, num: int) -> list[Score]:
        """Each episode by itself."""
        starts = range(0, num, _BLOCK_EPISODES)
        args_list = [[self._part, shape, Block(start, min(start + _BLOCK_EPISODES, num))] for start in starts]

        def poll(num_done: int) -> None:
            self._tell(min(num, num_done * _BLOCK_EPISODES), num)
            self._poll(num_done)

        found: list[list[Score]] = self._crew.call("score", args_list, shared=[state], poll=poll)
        return [score for block in found for score in block]

    def _by_features(self, state: MetaState, shapes: Sequence[EpisodeShape], num: int) -> list[list[Score]]:
        """Each image goes through the network once, in however many episodes it is."""
        episodes = {
            shape: [self._sampler(shape).episode(index) for index in range(num)] for shape in dict.fromkeys(shapes)
        }
        images = _Images([episode for some in episodes.values() for episode in some])
        features = torch.from_numpy(self._embedded(state, images.all))
        scores: list[list[Score]] = []
        for position, shape in enumerate(shapes):
            scores.append([self._score(features, images.places(episode), shape) for episode in episodes[shape]])
            self._tell((position + 1) * num, len(shapes) * num)
        return scores

    def _sampler(self, shape: EpisodeShape) -> EpisodeSampler:
        return EpisodeSampler(self._classes, shape, seed=self._model.config.seed, part=self._part)

    def _embedded(self, state: MetaState, images: Rows) -> Floats:
        if self._features_of is not None:
            return self._features_of(images)
        starts = range(0, len(images.rows), _BLOCK_IMAGES)
        args_list: list[list[Any]] = [[part[start : start + _BLOCK_IMAGES] for part in images] for start in starts]
        return np.concatenate(self._crew.call("features", args_list, shared=[state], poll=self._poll))

    def _score(self, features: torch.Tensor, places: npt.NDArray[np.int64], shape: EpisodeShape) -> Score:
        found = features[torch.from_numpy(places)]
        support, queries = found[:, : shape.num_shots].flatten(0, 1), found[:, shape.num_shots :].flatten(0, 1)
        return score_features(self._model.embedding, support, queries, num_ways=shape.num_ways)


class _Images:
    """The distinct images of episodes."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._num_rows = 1 + max(int(episode.rows.max()) for episode in episodes)
        self._keys = np.unique(np.concatenate([self._keys_of(episode).ravel() for episode in episodes]))

    @property
    def all(self) -> Rows:
        turns, rows = np.divmod(self._keys, self._num_rows)
        return Rows(rows, turns)

    def places(self, episode: Episode) -> npt.NDArray[np.int64]:
        """Returns where the images of an episode are among all, [ways, shots + queries]."""
        return np.searchsorted(self._keys, self._keys_of(episode))

    def _keys_of(self, episode: Episode) -> npt.NDArray[np.int64]:
        return episode.turns[:, None] * self._num_rows + episode.rows


def measured(shape: EpisodeShape, batchnorm: BatchNormMode, scores: Sequence[Score]) -> Measured:
    """Returns the mean of the scores of episodes and the 95 % confidence interval of the mean."""
    accuracies = np.array([score.accuracy for score in scores])
    nearest = [score.nearest_neighbour for score in scores if score.nearest_neighbour is not None]
    deviation = float(accuracies.std(ddof=1)) if len(scores) > 1 else 0.0
    return Measured(
        *shape,
        batchnorm=batchnorm.value,
        accuracy=float(accuracies.mean()),
        ci95=_Z95 * deviation / sqrt(len(scores)),
        nearest_neighbour=float(np.mean(nearest)) if nearest else None,
        num_episodes=len(scores),
        num_diverged=sum(score.is_diverged for score in scores),
    )
