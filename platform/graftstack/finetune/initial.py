"""Backbones as a training finds them: built, with their weights, and what images those know."""

import torch
from torch import Tensor

from graftstack.backbones.backbone import Backbone, resolve_depth
from graftstack.backbones.catalog import default_image_size, require_known
from graftstack.backbones.preprocessing import Preprocessing, preprocessing_of
from graftstack.backbones.published import is_published
from graftstack.backbones.registry import build
from graftstack.backbones.weight_files import digest_of
from graftstack.backbones.weights import load_weights
from graftstack.config.base_models import RUN_PREFIX
from graftstack.config.schema import FinetuneConfig
from graftstack.data.table import read_table
from graftstack.errors import ConfigError, RunError, StorageUnreachableError, WeightsError
from graftstack.finetune.artifact import WEIGHTS, read_card
from graftstack.reason import reason
from graftstack.runs import find_run
from graftstack.seeding import derive_seed
from graftstack.storage import Folder


class InitialBackbone:
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


def read_backbone(config: FinetuneConfig, preprocessing: Preprocessing, num_classes: int | None) -> InitialBackbone:
    """Returns the backbone of a configuration, with its weights.

    Args:
        config: The training.
        preprocessing: How it sees images.
        num_classes: Of the data; None: `config.data` says, where that matters.

    Raises:
        ConfigError, DataError, WeightsError, RunError: there is no such backbone or no such weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "backbone"))
        head_size = _head_size(config, num_classes)
        backbone = build(config.backbone.name, num_classes=head_size, image_size=preprocessing.image_size)
    resolve_depth(config.freeze_depth, backbone)
    weights_used = _load_weights(config, backbone)
    _check_image_size(backbone, preprocessing.image_size)
    return InitialBackbone(backbone, weights_used)


def _head_size(config: FinetuneConfig, num_classes: int | None) -> int | None:
    """Outputs of the backbone's own head: one for each class if it is kept, else as the family has it."""
    if not config.backbone.keep_head:
        return None
    return len(read_table(config.data).class_names) if num_classes is None else num_classes


def _model_of_run(config: FinetuneConfig) -> Folder | None:
    """Returns the model folder that ``backbone.weights=run:RUN`` names, or None for other weights."""
    if not config.backbone.weights.startswith(RUN_PREFIX):
        return None
    try:
        run = find_run(config.backbone.weights.removeprefix(RUN_PREFIX), config.runs_dir)
        return Folder(run.artifact("model"))
    except (RunError, StorageUnreachableError) as error:
        raise RunError(f"backbone.weights={RUN_PREFIX}{error}") from error


def preprocessing_for(config: FinetuneConfig) -> Preprocessing:
    """Returns how images are brought into the form that the weights know, in the size that is asked for, if one is.

    Raises `ConfigError`, `WeightsError`.
    """
    require_known(config.backbone.name)
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


def weights_digest(config: FinetuneConfig) -> str:
    """Returns a hash of the file of initial weights; empty where their name says it all, or there is no such file."""
    weights = config.backbone.weights
    if weights == "none" or is_published(weights):
        return ""
    folder = _model_of_run(config)
    return digest_of(weights if folder is None else folder.path(WEIGHTS))


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
