"""Names to backbones: a family is one file in `families/` and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from graftstack.backbones.backbone import Anatomy, Backbone
from graftstack.backbones.catalog import family_of
from graftstack.backbones.families import (
    cifar_resnet,
    conv4,
    convnext,
    densenet,
    efficientnet,
    mobilenet,
    regnet,
    resnet,
    shufflenet,
    squeezenet,
    swin,
    timm_models,
    vgg,
    vit,
)
from graftstack.errors import ConfigError
from graftstack.machine import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def _torchvision(name: str, num_classes: int | None = None, **arguments: int) -> nn.Module:
    """The torchvision model, randomly initialised; torchvision is loaded by the families that need it alone."""
    from torchvision.models import get_model

    if num_classes is not None:
        arguments["num_classes"] = num_classes
    model: nn.Module = get_model(name, weights=None, **arguments)
    return model


def _same_name(key: str) -> str:
    return key


class Family(NamedTuple):
    """How the models of one family are made and taken apart."""

    split: Callable[[Any], Anatomy]
    make: Callable[..., nn.Module] = _torchvision
    current_name: Callable[[str], str] = _same_name
    """A key of the family's published files -> the model's name for it."""
    takes_image_size: bool = False
    """Whether the model has parameters that depend on the size of the images."""


FAMILIES: Final[dict[str, Family]] = {
    "cifar_resnet": Family(cifar_resnet.split, cifar_resnet.make),
    "conv4": Family(conv4.split, conv4.make),
    "convnext": Family(convnext.split),
    "densenet": Family(densenet.split, current_name=densenet.current_name),
    "efficientnet": Family(efficientnet.split),
    "mnasnet": Family(mobilenet.split_mnasnet),
    "mobilenet_v2": Family(mobilenet.split_v2),
    "mobilenet_v3": Family(mobilenet.split_v3),
    "regnet": Family(regnet.split),
    "resnet": Family(resnet.split),
    "shufflenet_v2": Family(shufflenet.split),
    "squeezenet": Family(squeezenet.split),
    "swin": Family(swin.split),
    "timm": Family(timm_models.split, timm_models.make),
    "vgg": Family(vgg.split),
    "vit": Family(vit.split, current_name=vit.current_name, takes_image_size=True),
}


def build(name: str, *, num_classes: int | None = None, image_size: int | None = None) -> Backbone:
    """A backbone with random weights from torch's current random stream.

    It is there for many batches, each of which takes as much memory as the one before: from now on this process keeps
    what it frees (`machine.keep_freed_memory`).

    Args:
        name: A name of the catalog, or `timm/NAME`.
        num_classes: Outputs of the model's own head; default: the family's own number.
        image_size: Height and width in pixels that a ViT gets positions for; other families take any size.

    Raises:
        ConfigError: The name is unknown, or needs timm and timm is missing.
    """
    family = FAMILIES[family_of(name)]
    keep_freed_memory()
    arguments = {}
    if family.takes_image_size and image_size is not None:
        arguments["image_size"] = image_size
    try:
        model = family.make(name, num_classes, **arguments)
    except AssertionError as error:
        raise ConfigError(
            f"data.image_size={image_size}: {name} can't take it ({error}); use a multiple of its patch"
        ) from error
    return Backbone(name, model, family.split(model))
