"""ConvNeXt (Liu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftstack.backbones.anatomy import Anatomy, chain, each_child

if TYPE_CHECKING:
    from torchvision.models import ConvNeXt


def split(model: ConvNeXt) -> Anatomy:
    """Groups: features.0 .. features.7 (stem, stages and downsamplings in turn) | pool with the final norm."""
    norm, flatten, head = model.classifier
    groups = (*each_child("features", model.features), chain("pool", model.avgpool, norm, flatten))
    return Anatomy(groups, head=head, head_names=("classifier.2",), feature_dim=head.in_features)
