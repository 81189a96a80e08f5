"""Predicting with the method of a finished run: it learns new classes from a few images of each."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from graftstack.config.meta import BatchNormMode, MetaConfig
from graftstack.config.schema import DataConfig
from graftstack.data.labels import UNKNOWN
from graftstack.data.load import ImageData, images_of
from graftstack.data.table import SourceTable, read_table
from graftstack.errors import BadInputError, DataError, TrainingError, some_of
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.predictions import prediction_table
from graftstack.meta.artifact import LoadedMeta, load_meta
from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.episode_images import EpisodeBatch, EpisodeImages
from graftstack.meta.inner_loop import diverged_step
from graftstack.meta.methods import Prediction, inner_settings
from graftstack.runs import Run
from graftstack.storage import Folder

Reading = Callable[[int, int], None]


def predict_meta(run: Run, data: DataConfig, support: DataConfig, *, progress: Reading | None = None) -> pa.Table:
    """Returns a prediction for every row of `data`, as `predictions.prediction_table`, whatever its label, if any.

    The classes are those of `support`. Queries are normalised as in the run's evaluation: inductive ones don't depend
    on each other, transductive ones are one batch.

    Args:
        run: A finished meta-training.
        data: The queries.
        support: Labelled images of the classes, any number of each.
        progress: Told how many images are decoded, of all.

    Raises:
        BadInputError: the run has no model, the data can't be read, the method can't learn these classes, or there is
            only one query to normalise with itself.
        TrainingError: the inner loop diverged; names the step.
    """
    learner = load_meta(Folder(run.artifact("model")))
    data, support = replace(data, classes=[]), replace(support, classes=[])  # all that there are
    known = _support_table(support, learner.model.config)
    asked = read_table(data, class_names=known.class_names, require_labels=False)
    _check_company(learner, len(asked))
    size = learner.card.image_size
    shown = images_of(known, support, image_size=size, progress=progress)
    queries = images_of(asked, data, image_size=size, progress=progress)
    _check_all_shown(shown)
    _check_company(learner, len(queries))  # some may have been skipped
    with torch.no_grad():
        logits = _logits(learner, shown, queries)
    return prediction_table(logits, queries, np.arange(len(queries)))


def _support_table(support: DataConfig, config: MetaConfig) -> SourceTable:
    try:
        source = read_table(support)
    except DataError as error:
        raise DataError(f"--support: {error}") from error
    names = source.class_names
    if len(names) < 2:
        raise DataError(f"--support: all images are of class {names[0]}; give images of two classes or more")
    if config.method.adapts and len(names) != config.num_ways:
        raise BadInputError(
            f"--support: has {len(names)} classes, and the head of method={config.method.value} tells "
            f"num_ways={config.num_ways} apart; give images of {config.num_ways} classes, or use a run with "
            "method=prototypes"
        )
    return source


def _check_all_shown(shown: ImageData) -> None:
    """Images that can't be decoded may have been skipped."""
    missing = np.setdiff1d(np.arange(len(shown.class_names)), shown.labels)
    if len(missing):
        raise DataError(
            f"--support: none of the images of class {some_of([shown.class_names[label] for label in missing])} can be "
            "decoded; give others"
        )


def _check_company(learner: LoadedMeta, num_queries: int) -> None:
    if _is_transductive(learner) and learner.model.network.has_batchnorm and num_queries == 1:
        raise BadInputError(
            "eval.batchnorm=transductive: BatchNorm normalises queries together, and there is a single one; predict "
            "several at once, or use a run with eval.batchnorm=inductive"
        )


def _logits(learner: LoadedMeta, shown: ImageData, queries: ImageData) -> Tensor:
    """Returns the logits of all queries, fp32 [Q, classes of the support set]."""
    rows = _in_turn(shown.labels)
    labels = torch.from_numpy(shown.labels[rows])
    known = _Rows(EpisodeImages(shown.images, learner.card.preprocessing, learner.model.device), rows)
    asked = _Rows(
        EpisodeImages(queries.images, learner.card.preprocessing, learner.model.device), np.arange(len(queries))
    )
    if learner.model.config.method.adapts:
        return _after_adaptation(learner, known, labels, asked)
    if _is_transductive(learner):
        with batch_statistics():
            together = _features(learner, torch.cat([known.items(), asked.items()]))
        support, new = together.split([len(rows), len(queries)])
    else:
        size = inference_batch_size(learner.card.image_size)
        support, new = (
            torch.cat([_features(learner, some.items()) for some in part.batches(size)]) for part in (known, asked)
        )
    return learner.model.embedding.classify(support, labels, new, len(shown.class_names))


def _after_adaptation(learner: LoadedMeta, known: "_Rows", labels: Tensor, asked: "_Rows") -> Tensor:
    """The network adapts to the support images `known` before each batch of queries; transductive ones are all in one.

    Adaptation depends on the support set alone, and so is the same each time; batches are no smaller than that, lest it
    be most of the work.
    """
    num = len(known.rows)
    size = len(asked.rows) if _is_transductive(learner) else max(num, inference_batch_size(learner.card.image_size))
    support = known.items()
    logits = []
    for some in asked.batches(size):
        # Classes may differ in their numbers of shots. All images count as of one, in whose order reptile takes its
        # minibatches: the first image of each class, then the second, as in an episode.
        batch = EpisodeBatch(
            support=support,
            support_labels=labels,
            queries=some.items(),
            query_labels=torch.full((len(some.rows),), UNKNOWN),
            classes=torch.arange(learner.model.config.num_ways),
            num_ways=1,
            num_shots=num,
        )
        with learner.model.arithmetic():
            prediction = learner.model.adapting.query_logits(learner.params, learner.statistics, batch)
        _check_converged(prediction, learner.model.config)
        logits.append(prediction.logits.float())
    return torch.cat(logits)


def _check_converged(prediction: Prediction, config: MetaConfig) -> None:
    """What the last step leads to shows in the logits alone."""
    num_steps = diverged_step([*prediction.inner_losses.tolist(), float(prediction.logits.sum())])
    if num_steps is not None:
        raise TrainingError(
            f"inner_lr={inner_settings(config).lr:g}: the inner loop diverged at its step {max(1, num_steps)} on this "
            "support set; use a run with a lower one"
        )


class _Rows(NamedTuple):
    """Some images, in an order."""

    images: EpisodeImages
    rows: npt.NDArray[np.int64]

    def items(self) -> Tensor:
        """Returns them as the network takes them, [N, 3, S, S]."""
        return self.images.items(self.rows, np.zeros_like(self.rows))

    def batches(self, size: int) -> "Iterator[_Rows]":
        """Returns up to `size` of them at a time."""
        return (self._replace(rows=self.rows[start : start + size]) for start in range(0, len(self.rows), size))


def _in_turn(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns all rows: the first of each class, then the second of each, and so on."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    places = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort(places, kind="stable")]


def _features(learner: LoadedMeta, images: Tensor) -> Tensor:
    return learner.model.features(learner.params, learner.statistics, images)


def _is_transductive(learner: LoadedMeta) -> bool:
    return learner.model.config.eval.batchnorm is BatchNormMode.transductive
