"""From a configuration to everything a training needs, checked before anything is written."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graftstack.backbones.backbone import Backbone, resolve_depth
from graftstack.backbones.preprocessing import Preprocessing
from graftstack.config.plain import to_plain
from graftstack.config.schema import ClassWeights, FinetuneConfig
from graftstack.data.load import ImageData, load_images, split_again
from graftstack.errors import ConfigError, DataError
from graftstack.finetune.artifact import ModelCard
from graftstack.finetune.batches import steps_per_epoch
from graftstack.finetune.initial import InitialBackbone, preprocessing_for, read_backbone
from graftstack.finetune.inputs import Augmentation, ImageInputs, Inputs
from graftstack.finetune.metrics import balanced_weights
from graftstack.finetune.model import GraftedModel, graft
from graftstack.finetune.phases import Phase, phases


@dataclass(frozen=True, kw_only=True)
class Task:
    """A validated training: data, model and the phases of its recipe."""

    config: FinetuneConfig
    data: ImageData
    model: GraftedModel
    preprocessing: Preprocessing
    freeze_depth: int
    weights_used: str
    """Where the initial weights came from, for people."""
    tap: Inputs | None = None
    """What the frozen groups make of the images, where that is stored."""

    @property
    def inputs(self) -> Inputs:
        """What the model is fed: the tap if there is one, else the images."""
        return self.tap or self.images

    @cached_property
    def images(self) -> ImageInputs:
        """The images, with the random changes of the configuration."""
        config = self.config
        augmentation = Augmentation(config.augment, config.seed, config.augment_views)
        return ImageInputs(self.data.images, self.preprocessing, augmentation)

    @property
    def boundary(self) -> int:
        """The layer group from which on a tap can replace the images: all groups before it stay frozen throughout."""
        return min(self.freeze_depth, self.model.head_boundary)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return steps_per_epoch(self.config, len(self.data.splits.train))

    @cached_property
    def num_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.steps_per_epoch * self.config.epochs

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the recipe, over all steps."""
        return phases(self.config.recipe, num_steps=self.num_steps, depths=self._depths)

    @cached_property
    def class_weights(self) -> Tensor:
        """The weight of each class in the loss, fp32 [num_classes]."""
        num_classes = len(self.data.class_names)
        if self.config.class_weights is ClassWeights.none:
            return torch.ones(num_classes)
        return balanced_weights(torch.from_numpy(self.data.labels[self.data.splits.train]), num_classes)

    @cached_property
    def card(self) -> ModelCard:
        """What the run's artifact says of the model."""
        return ModelCard(
            backbone=self.config.backbone.name,
            class_names=self.data.class_names,
            image_size=self.preprocessing.image_size,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            freeze_depth=self.freeze_depth,
            keeps_head=self.config.backbone.keep_head,
        )

    @property
    def _depths(self) -> list[int]:
        """Freeze depths from all groups to the wanted one, without those that would thaw a group with no parameters."""
        backbone = self.model.backbone
        thawed = [index for index in range(self.freeze_depth, backbone.num_groups) if backbone.group_parameters(index)]
        return [backbone.num_groups, *sorted(set(thawed) - {self.freeze_depth}, reverse=True), self.freeze_depth]


def prepare(config: FinetuneConfig, *, progress: Callable[[int, int], None] | None = None) -> Task:
    """Reads the data, builds the model and checks that they fit together. Writes only to the image cache.

    Raises:
        ConfigError, DataError, WeightsError: what the user gave can't be trained; one line with the remedy.
    """
    return Workbench(progress=progress).task(config)


class Workbench:
    """Makes tasks that differ in their settings from data and backbones that are read once.

    The model of a task is that of the one before wherever their backbones are the same: a task is to be done with
    before the next is made.
    """

    def __init__(self, *, progress: Callable[[int, int], None] | None = None) -> None:
        self._progress = progress
        self._data: dict[str, ImageData] = {}
        """By the key of the data: as the last seed has split them."""
        self._seeds: dict[str, int] = {}
        self._backbones: dict[str, InitialBackbone] = {}

    def task(self, config: FinetuneConfig, *, data: ImageData | None = None) -> Task:
        """Returns a training with the backbone's initial weights and a new head.

        Args:
            config: The training.
            data: Images that were read before, to be used in place of those of `config.data`.

        Raises:
            ConfigError, DataError, WeightsError: as `prepare`; or `data` isn't of the size that the backbone takes.
        """
        if data is None and not config.data.has_images:
            raise DataError(
                "data.image is missing: a backbone learns from images; name their column, data.image=COLUMN"
            )
        preprocessing = preprocessing_for(config)
        if data is not None:
            check_size(data, preprocessing, backbone=config.backbone.name)
        initial = self._initial_backbone(config, preprocessing, None if data is None else len(data.class_names))
        backbone = initial.restored()
        freeze_depth = resolve_depth(config.freeze_depth, backbone)
        if config.epochs and config.batch_size < 2 * config.cluster.max_workers:
            _check_lone_image(config, backbone, preprocessing.image_size, freeze_depth)
        data = self._images(config, preprocessing.image_size) if data is None else data
        _check_batch_size(config, len(data.splits.train))
        num_classes = len(data.class_names)
        return Task(
            config=config,
            data=data,
            model=graft(backbone, num_classes=num_classes, keep_head=config.backbone.keep_head, seed=config.seed),
            preprocessing=preprocessing,
            freeze_depth=freeze_depth,
            weights_used=initial.weights_used,
        )

    def model(self, config: FinetuneConfig, *, num_classes: int) -> GraftedModel:
        """Returns the backbone with its initial weights and a new head, without any data. Raises as `prepare`."""
        backbone = self._initial_backbone(config, preprocessing_for(config), num_classes).restored()
        return graft(backbone, num_classes=num_classes, keep_head=config.backbone.keep_head, seed=config.seed)

    def _initial_backbone(
        self, config: FinetuneConfig, preprocessing: Preprocessing, num_classes: int | None
    ) -> InitialBackbone:
        is_random = config.backbone.weights == "none"
        own_classes = ""
        if config.backbone.keep_head:
            own_classes = _key_of(config.data if num_classes is None else num_classes)
        key = _key_of(config.backbone, config.runs_dir, preprocessing, own_classes, config.seed if is_random else None)
        if key not in self._backbones:
            # One at a time: they are large.
            self._backbones = {key: read_backbone(config, preprocessing, num_classes)}
        return self._backbones[key]

    def _images(self, config: FinetuneConfig, image_size: int) -> ImageData:
        key = _key_of(config.data, image_size)
        if key not in self._data:
            data = load_images(config.data, image_size=image_size, seed=config.seed, progress=self._progress)
            self._data[key] = data
        elif self._seeds[key] != config.seed:
            self._data[key] = split_again(self._data[key], config.data, seed=config.seed)
        self._seeds[key] = config.seed
        return self._data[key]


def _key_of(*parts: Any) -> str:
    return json.dumps([to_plain(part) for part in parts])


def check_size(data: ImageData, preprocessing: Preprocessing, *, backbone: str) -> None:
    """Raises `DataError` where images don't have the size that a backbone is to see."""
    size, wanted = data.images.image_size, preprocessing.image_size
    if size != wanted:
        raise DataError(
            f"data.image_size={size}: the images have {size} pixels and {backbone} is to see {wanted}; "
            f"use data.image_size={wanted}, or one size for all that see them"
        )


def _check_batch_size(config: FinetuneConfig, num_train: int) -> None:
    per_step = config.batch_size * config.accumulate
    if not config.epochs or per_step <= num_train:
        return
    remedy = f"batch_size={num_train // config.accumulate} or less"
    if config.accumulate > num_train:
        remedy = f"accumulate={max(1, num_train // config.batch_size)} or less"
    given = f"batch_size={config.batch_size}{f', accumulate={config.accumulate}' if config.accumulate > 1 else ''}"
    raise ConfigError(f"{given}: a step takes {per_step} images and the training part has {num_train}; use {remedy}")


def _check_lone_image(config: FinetuneConfig, backbone: Backbone, size: int, freeze_depth: int) -> None:
    """BatchNorm can't learn from one value a channel: a single image whose map has shrunk to one pixel."""
    trial = copy.deepcopy(backbone)
    trial.freeze(freeze_depth)
    # Where the training before has left it: on a GPU perhaps.
    image = torch.zeros(1, 3, size, size, device=next(trial.parameters()).device)
    try:
        with torch.no_grad():
            trial.train()(image)
    except ValueError as error:
        num = 2 * config.cluster.max_workers
        raise ConfigError(
            f"batch_size={config.batch_size}: BatchNorm of {backbone.name} needs two images or more on each worker at "
            f"data.image_size={size}; use batch_size={num} or more, or freeze_depth=all"
        ) from error
