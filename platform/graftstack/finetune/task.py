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
from graftstack.backbones.catalog import default_image_size, require_known
from graftstack.backbones.preprocessing import Preprocessing, preprocessing_of
from graftstack.backbones.registry import build
from graftstack.backbones.weights import load_weights
from graftstack.config.plain import to_plain
from graftstack.config.schema import ClassWeights, FinetuneConfig
from graftstack.data.load import ImageData, load_images, split_again
from graftstack.data.table import read_table
from graftstack.errors import ConfigError, DataError, RunError, WeightsError
from graftstack.finetune.artifact import WEIGHTS, ModelCard, read_card
from graftstack.finetune.batches import steps_per_epoch
from graftstack.finetune.inputs import Augmentation, ImageInputs, Inputs
from graftstack.finetune.metrics import balanced_weights
from graftstack.finetune.model import GraftedModel, graft
from graftstack.finetune.phases import Phase, phases
from graftstack.reason import reason
from graftstack.runs import find_run
from graftstack.seeding import derive_seed
from graftstack.storage import Folder

_RUN_PREFIX = "run:"


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
        self._backbones: dict[str, _InitialBackbone] = {}

    def task(self, config: FinetuneConfig) -> Task:
        """Returns a training with the backbone's initial weights and a new head. Raises as `prepare`."""
        require_known(config.backbone.name)
        preprocessing = _preprocessing(config)
        initial = self._initial_backbone(config, preprocessing)
        backbone = initial.restored()
        freeze_depth = resolve_depth(config.freeze_depth, backbone)
        if config.epochs and config.batch_size < 2 * config.cluster.max_workers:
            _check_lone_image(config, backbone, preprocessing.image_size, freeze_depth)
        data = self._images(config, preprocessing.image_size)
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

    def _initial_backbone(self, config: FinetuneConfig, preprocessing: Preprocessing) -> "_InitialBackbone":
        is_random = config.backbone.weights == "none"
        own_classes = _key_of(config.data) if config.backbone.keep_head else ""
        key = _key_of(config.backbone, config.runs_dir, preprocessing, own_classes, config.seed if is_random else None)
        if key not in self._backbones:
            self._backbones = {key: _read_backbone(config, preprocessing)}  # one at a time: they are large
        return self._backbones[key]

    def _images(self, config: FinetuneConfig, image_size: int) -> ImageData:
        if config.data.features and config.data.image is None:
            raise DataError("data.features: a backbone learns from images; name their column with data.image=COLUMN")
        key = _key_of(config.data, image_size)
        if key not in self._data:
            data = load_images(config.data, image_size=image_size, seed=config.seed, progress=self._progress)
            self._data[key] = data
        elif self._seeds[key] != config.seed:
            self._data[key] = split_again(self._data[key], config.data, seed=config.seed)
        self._seeds[key] = config.seed
        return self._data[key]


class _InitialBackbone:
    """A backbone that can be trained again and again, each time from its initial weights."""

    def __init__(self, backbone: Backbone, weights_used: str) -> None:
        self._backbone = backbone
        self.weights_used = weights_used
        self._initial: dict[str, Tensor] | None = None

    def restored(self) -> Backbone:
        """Returns the backbone as it was before the last training, with all groups frozen: who trains it thaws some.

        So the groups that aren't frozen when it comes back are those that may have changed.
        """
        backbone = self._backbone
        state = backbone.model.state_dict()
        if self._initial is None:
            self._initial = {name: tensor.clone() for name, tensor in state.items()}
        else:
            with torch.no_grad():
                for name, tensor in backbone.group_state(backbone.freeze_depth, backbone.num_groups).items():
                    tensor.copy_(self._initial[name])
        backbone.freeze(backbone.num_groups)
        return backbone


def _read_backbone(config: FinetuneConfig, preprocessing: Preprocessing) -> _InitialBackbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "backbone"))
        backbone = build(config.backbone.name, num_classes=_head_size(config), image_size=preprocessing.image_size)
    resolve_depth(config.freeze_depth, backbone)
    weights_used = _load_weights(config, backbone)
    _check_image_size(backbone, preprocessing.image_size)
    return _InitialBackbone(backbone, weights_used)


def _key_of(*parts: Any) -> str:
    return json.dumps([to_plain(part) for part in parts])


def _head_size(config: FinetuneConfig) -> int | None:
    """Outputs of the backbone's own head: one for each class if it is kept, else as the family has it."""
    return len(read_table(config.data).class_names) if config.backbone.keep_head else None


def _model_of_run(config: FinetuneConfig) -> Folder | None:
    """Returns the model folder that ``backbone.weights=run:RUN`` names, or None for other weights."""
    if not config.backbone.weights.startswith(_RUN_PREFIX):
        return None
    try:
        run = find_run(config.backbone.weights.removeprefix(_RUN_PREFIX), config.runs_dir)
        return Folder(run.artifact("model"))
    except RunError as error:
        raise RunError(f"backbone.weights={_RUN_PREFIX}{error}") from error


def _preprocessing(config: FinetuneConfig) -> Preprocessing:
    """Images as the weights know them, in the size that the configuration asks for, if it asks."""
    if folder := _model_of_run(config):
        wanted = read_card(folder).preprocessing
    else:
        wanted = preprocessing_of(config.backbone.name, config.backbone.weights)
    size = config.data.image_size
    return wanted if size is None else wanted._replace(image_size=size)


def _load_weights(config: FinetuneConfig, backbone: Backbone) -> str:
    """Loads the configured weights and returns where they came from, for people."""
    weights, keep_head = config.backbone.weights, config.backbone.keep_head
    folder = _model_of_run(config)
    if folder is None:
        return load_weights(backbone, weights, keep_head=keep_head).description
    card = read_card(folder)
    if keep_head:
        raise ConfigError(f"backbone.keep_head=true: {weights} brings no head of the backbone's own; leave it out")
    if card.backbone != backbone.name:
        raise WeightsError(f"backbone={backbone.name}: {weights} holds a {card.backbone}; add backbone={card.backbone}")
    load_weights(backbone, folder.path(WEIGHTS))
    return f"{weights} ({card.backbone} trained on {len(card.class_names)} classes)"


def _check_batch_size(config: FinetuneConfig, num_train: int) -> None:
    per_step = config.batch_size * config.accumulate
    if not config.epochs or per_step <= num_train:
        return
    remedy = f"batch_size={num_train // config.accumulate} or less"
    if config.accumulate > num_train:
        remedy = f"accumulate={max(1, num_train // config.batch_size)} or less"
    given = f"batch_size={config.batch_size}{f', accumulate={config.accumulate}' if config.accumulate > 1 else ''}"
    raise ConfigError(f"{given}: a step takes {per_step} images and the training part has {num_train}; use {remedy}")


def _check_image_size(backbone: Backbone, size: int) -> None:
    """Feeds the backbone a blank image."""
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.image_size={size}: {backbone.name} can't take images of {size}x{size} pixels "
            f"({reason(error)}); use its own {default_image_size(backbone.name)}"
        ) from error


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
