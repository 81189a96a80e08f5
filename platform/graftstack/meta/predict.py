"""Predicting and evaluating with the method of a finished run: it learns new classes from a few images of each."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.registry import build
from graftstack.config.meta import BatchNormMode, MetaConfig
from graftstack.config.schema import DataConfig, Precision
from graftstack.data.load import ImageData, images_of
from graftstack.data.table import SourceTable, read_table
from graftstack.errors import BadInputError, DataError, TrainingError, some_of
from graftstack.finetune.inference import inference_batch_size
from graftstack.finetune.model import without_prefix
from graftstack.finetune.predict import data_of_run
from graftstack.finetune.predictions import prediction_table
from graftstack.machine import usable_cpus
from graftstack.meta.artifact import LoadedMeta, load_meta
from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.classes import Classes, ClassSplit, split_classes
from graftstack.meta.crew import InlineCrew
from graftstack.meta.episode_images import EpisodeBatch, EpisodeImages
from graftstack.meta.evaluation import Evaluation, Measured
from graftstack.meta.job import table_shapes
from graftstack.meta.methods import inner_settings
from graftstack.meta.runner import EpisodeRunner, RunnerSettings
from graftstack.meta.tapped import TappedFeatures, tapped_features
from graftstack.meta.task import MetaTask
from graftstack.runs import Run
from graftstack.storage import Folder

Reading = Callable[[int, int], None]

_Positions = npt.NDArray[np.int64]


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
    known = _support_table(support, learner.model.config)
    asked = read_table(replace(data, classes=[]), class_names=known.class_names, require_labels=False)
    _check_company(learner, len(asked))
    size = learner.card.image_size
    shown = images_of(known, support, image_size=size, progress=progress)
    queries = images_of(asked, data, image_size=size, progress=progress)
    _check_all_shown(shown)
    _check_company(learner, len(queries))
    with torch.no_grad():
        logits = _logits(learner, shown, queries)
    return prediction_table(logits, queries, np.arange(len(queries)))


def evaluate_meta(
    run: Run,
    data: DataConfig | None = None,
    *,
    part: str = "test",
    progress: Reading | None = None,
    tell: Callable[[int, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Returns a run's table of few-shot accuracy, measured in this process; of its own held-out classes, the same one.

    Args:
        run: A finished meta-training.
        data: Other data, all of whose classes are held out; None: the run's own.
        part: Whose classes of the run's own data: train, val or test.
        progress: Told how many images are decoded, of all.
        tell: Told how many episodes are scored, of all.
        say: Given a line where there is something to say.

    Raises:
        BadInputError: the run has no model, the data can't be read, or has too few classes or images for an episode.
    """
    learner = load_meta(Folder(run.artifact("model")))
    config = learner.model.config
    config = replace(config, data=data_of_run(run) if data is None else replace(data, classes=[]))
    images = images_of(read_table(config.data), config.data, image_size=learner.card.image_size, progress=progress)
    if data is None:
        split = _own_classes(learner, images, config)
    else:
        split, part = _all_test(learner, images, config), "test"
    classes: Classes = getattr(split, part)
    _check_enough(classes, config, part)
    torch.set_num_threads(_num_threads(config))
    task = MetaTask(
        config=config,
        data=images,
        classes=split,
        backbone=_backbone(learner),
        preprocessing=learner.card.preprocessing,
        weights_used="",
    )
    settings = RunnerSettings(
        config=config,
        classes=split,
        images=images.images,
        preprocessing=task.preprocessing,
        device="cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu",
    )
    crew = InlineCrew(EpisodeRunner(settings))
    state = learner.model.pack(learner.params, learner.statistics)
    taps: AbstractContextManager[TappedFeatures | None] = nullcontext()
    if not config.num_episodes:  # what the run has measured it has read from a tap
        taps = tapped_features(task, state, crew, part=part, say=say)
    with taps as features_of:
        evaluation = Evaluation(learner.model, crew, classes, part, features_of=features_of, tell=tell)
        return evaluation.measure(state, table_shapes(config), num_episodes=config.eval.num_episodes)


def _support_table(support: DataConfig, config: MetaConfig) -> SourceTable:
    try:
        source = read_table(replace(support, classes=[]))
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
    is_transductive = learner.model.config.eval.batchnorm is BatchNormMode.transductive
    if is_transductive and learner.model.network.has_batchnorm and num_queries == 1:
        raise BadInputError(
            "eval.batchnorm=transductive: BatchNorm normalises queries together, and there is a single one; predict "
            "several at once, or use a run with eval.batchnorm=inductive"
        )


class _Shown(NamedTuple):
    """The support set."""

    images: EpisodeImages
    rows: _Positions
    labels: Tensor
    """``int64 [N]``"""
    num_ways: int


def _logits(learner: LoadedMeta, shown: ImageData, queries: ImageData) -> Tensor:
    """Returns the logits of all queries, fp32 [Q, classes of the support set]."""
    rows = _first_of_each_class_first(shown.labels)
    support = _Shown(
        _images(learner, shown), rows, torch.from_numpy(shown.labels[rows]), num_ways=len(shown.class_names)
    )
    images = _images(learner, queries)
    if learner.model.config.method.adapts:
        return _after_adaptation(learner, support, images, len(queries))
    if learner.model.config.eval.batchnorm is BatchNormMode.transductive:
        together = torch.cat([_items(support.images, rows), _items(images, np.arange(len(queries)))])
        with batch_statistics():
            known, new = _features(learner, together).split([len(rows), len(queries)])
    else:
        known = torch.cat([_features(learner, _items(support.images, some)) for some in _batches(learner, rows)])
        every = np.arange(len(queries))
        new = torch.cat([_features(learner, _items(images, some)) for some in _batches(learner, every)])
    return learner.model.embedding.classify(known, support.labels, new, support.num_ways)


def _after_adaptation(learner: LoadedMeta, support: _Shown, queries: EpisodeImages, num_queries: int) -> Tensor:
    """Transductive queries are one batch; inductive ones come in several, before each of which the network adapts."""
    config = learner.model.config
    every = np.arange(num_queries)
    num = len(support.rows)
    if config.eval.batchnorm is BatchNormMode.transductive:
        batches = [every]
    else:
        batches = _batches(learner, every, at_least=num)  # so that adaptation isn't most of the work
    shown = _items(support.images, support.rows)
    pieces = []
    for some in batches:
        # Classes may differ in their numbers of shots. Reptile takes its minibatches as if all images were of one:
        # in their order, which has the first image of each class first, as in an episode.
        batch = EpisodeBatch(
            support=shown,
            support_labels=support.labels,
            queries=_items(queries, some),
            query_labels=torch.full((len(some),), -1),
            classes=torch.arange(support.num_ways),
            num_ways=1,
            num_shots=num,
        )
        with _arithmetic(config):
            prediction = learner.model.adapting.query_logits(learner.params, learner.statistics, batch)
        _check_converged(prediction.inner_losses, config)
        pieces.append(prediction.logits.float())
    return torch.cat(pieces)


def _check_converged(losses: Tensor, config: MetaConfig) -> None:
    lost = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if lost:
        raise TrainingError(
            f"inner_lr={inner_settings(config).lr:g}: the inner loop diverged at its step {lost[0] + 1} on this support "
            f"set (loss {losses[lost[0]]:g}); use a run with a lower one"
        )


def _features(learner: LoadedMeta, images: Tensor) -> Tensor:
    with _arithmetic(learner.model.config):
        return learner.model.network.features(learner.params, learner.statistics, images).float()


def _batches(learner: LoadedMeta, rows: _Positions, *, at_least: int = 1) -> list[_Positions]:
    size = max(inference_batch_size(learner.card.image_size), at_least)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _images(learner: LoadedMeta, data: ImageData) -> EpisodeImages:
    return EpisodeImages(data.images, learner.card.preprocessing, learner.model.device)


def _items(images: EpisodeImages, rows: _Positions) -> Tensor:
    return images.items(rows, np.zeros_like(rows))


def _arithmetic(config: MetaConfig) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision is Precision.bf16)


def _first_of_each_class_first(labels: _Positions) -> _Positions:
    """Returns all rows: the first of each class, then the second of each, and so on."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    places = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort(places, kind="stable")]


def _own_classes(learner: LoadedMeta, images: ImageData, config: MetaConfig) -> ClassSplit:
    split = split_classes(images, config)
    if split.train.names != learner.card.class_names:
        raise DataError(
            f"data={config.data.source.value}: its classes aren't those that the run was trained with; give data to "
            "evaluate on"
        )
    return split


def _all_test(learner: LoadedMeta, images: ImageData, config: MetaConfig) -> ClassSplit:
    """Returns all classes there are as held out; those of training are known by name alone."""
    every = replace(config, eval=replace(config.eval, classes=list(images.class_names)))
    return ClassSplit(
        train=_without_images(learner.card.class_names), val=_without_images(()), test=split_classes(images, every).test
    )


def _without_images(names: tuple[str, ...]) -> Classes:
    none = np.zeros(len(names), dtype=np.int64)
    return Classes(names=names, rows=none[:, None][:, :0], counts=none, turns=none, labels=none - 1)


def _check_enough(classes: Classes, config: MetaConfig, part: str) -> None:
    ways, needed = max(config.eval_ways), max(config.eval_shots) + config.num_queries
    if len(classes) < ways:
        raise DataError(
            f"num_ways={ways}: an episode takes more classes than the {len(classes)} there are for --split {part}; use "
            "another part, or data with more classes"
        )
    few = np.flatnonzero(classes.counts < needed)
    if len(few):
        raise DataError(
            f"num_shots={max(config.eval_shots)}, num_queries={config.num_queries}: an episode takes {needed} images of "
            f"each class, but there are fewer of {some_of([f'{classes.names[i]} ({classes.counts[i]})' for i in few])}; "
            "use data with more images"
        )


def _num_threads(config: MetaConfig) -> int:
    """Returns the threads that the run had in one process; gradients depend on them in their last bits."""
    return config.cluster.cpus_per_worker or (usable_cpus() if config.episodes_per_step == 1 else 1)


def _backbone(learner: LoadedMeta) -> Backbone:
    """Returns the backbone with its weights: a tap is known by them."""
    backbone = build(learner.card.backbone, image_size=learner.card.image_size)
    own = without_prefix({**learner.params, **learner.statistics}, "backbone.")
    state = backbone.backbone_state()
    for name, tensor in own.items():
        state[name].copy_(tensor)
    backbone.freeze(0)
    return backbone.eval()
