"""EfficientNet and EfficientNetV2 (Tan and Le 2019, 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, chain, each_child

if TYPE_CHECKING:
    from torchvision.models import EfficientNet


def split(model: EfficientNet) -> Anatomy:
    """Groups: features.0 (stem) | the stages | the last convolution | pool."""
    groups = (*each_child("features", model.features), chain("pool", model.avgpool, nn.Flatten(1)))
    feature_dim = model.classifier[1].in_features
    return Anatomy(groups, head=model.classifier, head_names=("classifier",), feature_dim=feature_dim)
