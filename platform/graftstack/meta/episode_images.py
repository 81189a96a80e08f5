"""The images of episodes, as a network takes them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftstack.backbones.preprocessing import Preprocessing
from graftstack.data.images import Images
from graftstack.finetune.inputs import normalize
from graftstack.meta.episodes import Episode


class EpisodeBatch(NamedTuple):
    """The images of an episode: fp32, normalised, channels last; all of one class after all of another."""

    support: Tensor
    """``[ways * shots, 3, S, S]``."""
    support_labels: Tensor
    """``int64 [ways * shots]``: which of the episode's classes, 0..ways-1."""
    queries: Tensor
    """``[ways * queries, 3, S, S]``."""
    query_labels: Tensor
    """``int64 [ways * queries]``."""
    classes: Tensor
    """``int64 [ways]``: positions in the part's `Classes`."""
    num_ways: int
    num_shots: int


class EpisodeImages:
    """Makes batches of episodes out of `images`.

    Args:
        images: Of all rows.
        preprocessing: How the network expects them.
        device: Where the batches are to lie.
    """

    def __init__(self, images: Images, preprocessing: Preprocessing, device: torch.device) -> None:
        self._images, self._preprocessing, self._device = images, preprocessing, device

    def batch(self, episode: Episode) -> EpisodeBatch:
        """Returns the images of an episode. Raises `DataError` where one can't be decoded."""
        num_ways, per_class = episode.rows.shape
        num_shots, num_queries = episode.num_shots, per_class - episode.num_shots
        rows = [episode.rows[:, :num_shots].ravel(), episode.rows[:, num_shots:].ravel()]
        turns = [np.repeat(episode.turns, num_shots), np.repeat(episode.turns, num_queries)]
        images = self.items(np.concatenate(rows), np.concatenate(turns))
        support, queries = images.split([num_ways * num_shots, num_ways * num_queries])
        labels = torch.arange(num_ways, device=self._device)
        return EpisodeBatch(
            support=support,
            support_labels=labels.repeat_interleave(num_shots),
            queries=queries,
            query_labels=labels.repeat_interleave(num_queries),
            classes=torch.from_numpy(episode.classes).to(self._device),
            num_ways=num_ways,
            num_shots=num_shots,
        )

    def items(self, rows: npt.NDArray[np.int64], turns: npt.NDArray[np.int64]) -> Tensor:
        """Returns the images of `rows` [N], each after so many of `turns` [N]: fp32, channels last, [N, 3, S, S].

        Raises:
            DataError: one can't be decoded.
        """
        images = self._images.batch(rows)
        _turn(images.numpy(), turns)
        prepared = normalize(images, self._preprocessing, self._device)
        return prepared.contiguous(memory_format=torch.channels_last)


def _turn(images: npt.NDArray[np.uint8], turns: npt.NDArray[np.int64]) -> None:
    """Turns images [N, 3, S, S] in place, by quarters, counter-clockwise."""
    for num_quarters in (1, 2, 3):
        chosen = np.flatnonzero(turns == num_quarters)
        if len(chosen):
            images[chosen] = np.rot90(images[chosen], num_quarters, axes=(2, 3))
