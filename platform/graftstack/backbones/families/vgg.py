"""VGG, with and without batch norm (Simonyan and Zisserman 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, chain, split_after_pools

if TYPE_CHECKING:
    from torchvision.models import VGG


def split(model: VGG) -> Anatomy:
    """Groups: conv1 .. conv5, each ended by its max-pool | pool | fc6 | fc7; the head is dropout and the last layer."""
    fc6, fc7, head = model.classifier[:3], model.classifier[3:5], model.classifier[5:]
    groups = (
        *(chain(f"conv{index}", stage) for index, stage in enumerate(split_after_pools(model.features), start=1)),
        chain("pool", model.avgpool, nn.Flatten(1)),
        chain("fc6", fc6),
        chain("fc7", fc7),
    )
    return Anatomy(groups, head=head, head_names=("classifier.6",), feature_dim=fc7[0].out_features)
