"""From a configuration to everything that meta-learning needs, checked before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import FinetuneConfig
from graftstack.data.load import ImageData, images_of
from graftstack.data.table import read_table
from graftstack.errors import DataError
from graftstack.finetune.initial import preprocessing_for, read_backbone
from graftstack.meta.classes import ClassSplit, check_episodes, split_classes


@dataclass(frozen=True, kw_only=True)
class MetaTask:
    """A validated meta-training: images, the classes of each part, and the network to begin with."""

    config: MetaConfig
    data: ImageData
    classes: ClassSplit
    backbone: Backbone
    """With its initial weights."""
    preprocessing: Preprocessing
    weights_used: str
    """Where those came from, for people."""


def prepare_meta(config: MetaConfig, *, progress: Callable[[int, int], None] | None = None) -> MetaTask:
    """Reads the data, builds the backbone and checks that they fit together. Writes only to the image cache.

    Args:
        config: The meta-training.
        progress: Called with (images decoded, images in all).

    Raises:
        ConfigError, DataError, WeightsError, RunError: what the user gave can't be trained; one line with the remedy.
    """
    if not config.data.has_images:
        raise DataError("data.image is missing: a backbone learns from images; name their column, data.image=COLUMN")
    finetuning = as_finetuning(config)
    preprocessing = preprocessing_for(finetuning)
    initial = read_backbone(finetuning, preprocessing, None)
    source = read_table(config.data)
    data = images_of(source, config.data, image_size=preprocessing.image_size, progress=progress)
    classes = split_classes(data, config)
    check_episodes(classes, data, config)
    backbone = initial.restored()
    backbone.freeze(0)
    return MetaTask(
        config=config,
        data=data,
        classes=classes,
        backbone=backbone.eval(),
        preprocessing=preprocessing,
        weights_used=initial.weights_used,
    )


def as_finetuning(config: MetaConfig) -> FinetuneConfig:
    """Returns a fine-tuning with the same data, backbone and seed: what reads backbones takes one."""
    return FinetuneConfig(
        data=replace(config.data),
        backbone=config.backbone,
        freeze_depth="all",
        epochs=0,
        precision=config.precision,
        cluster=replace(config.cluster, num_workers=1),
        seed=config.seed,
        runs_dir=config.runs_dir,
    )
