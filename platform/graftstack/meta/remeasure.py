"""Measuring the method of a finished run again: on its own held-out classes, or on those of other data."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.registry import build
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import DataConfig
from graftstack.data.load import ImageData, images_of
from graftstack.data.table import read_table
from graftstack.errors import DataError, some_of
from graftstack.finetune.model import without_prefix
from graftstack.finetune.predict import data_of_run
from graftstack.meta.artifact import LoadedMeta, load_meta
from graftstack.meta.classes import Classes, ClassSplit, split_classes
from graftstack.meta.evaluation import Evaluation, Measured
from graftstack.meta.inline import inline_crew
from graftstack.meta.job import table_shapes
from graftstack.meta.tapped import TappedFeatures, tapped_features
from graftstack.meta.task import MetaTask
from graftstack.runs import Run
from graftstack.storage import Folder


def evaluate_meta(
    run: Run,
    data: DataConfig | None = None,
    *,
    part: str = "test",
    progress: Callable[[int, int], None] | None = None,
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
        split, of = _own_classes(learner, images, config), f"--split {part}"
    else:
        split, part, of = _all_test(learner, images, config), "test", f"data={config.data.source.value}"
    classes: Classes = getattr(split, part)
    _check_enough(classes, config, of=of)
    task = MetaTask(
        config=config,
        data=images,
        classes=split,
        backbone=_backbone(learner),
        preprocessing=learner.card.preprocessing,
        weights_used="",
    )
    crew = inline_crew(task)
    state = learner.model.pack(learner.params, learner.statistics)
    taps: AbstractContextManager[TappedFeatures | None] = nullcontext()
    if not config.num_episodes:  # what the run has measured it has read from a tap
        taps = tapped_features(task, state, crew, part=part, say=say)
    with taps as features_of:
        evaluation = Evaluation(learner.model, crew, classes, part, features_of=features_of, tell=tell)
        return evaluation.measure(state, table_shapes(config), num_episodes=config.eval.num_episodes)


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


def _check_enough(classes: Classes, config: MetaConfig, *, of: str) -> None:
    ways, num_shots = max(config.eval_ways), max(config.eval_shots)
    if len(classes) < ways:
        raise DataError(
            f"num_ways={ways}: an episode takes more classes than the {len(classes)} of {of}; measure on others"
        )
    needed = num_shots + config.num_queries
    few = [f"{classes.names[index]} ({classes.counts[index]})" for index in np.flatnonzero(classes.counts < needed)]
    if few:
        raise DataError(
            f"num_shots={num_shots}, num_queries={config.num_queries}: an episode takes {needed} images of each class, "
            f"but of {of} there are fewer of {some_of(few)}; measure on others"
        )


def _backbone(learner: LoadedMeta) -> Backbone:
    """Returns the backbone with its weights: a tap is known by them."""
    backbone = build(learner.card.backbone, image_size=learner.card.image_size)
    own = without_prefix({**learner.params, **learner.statistics}, "backbone.")
    state = backbone.backbone_state()
    for name, tensor in own.items():
        state[name].copy_(tensor)
    backbone.freeze(0)
    return backbone.eval()
