"""ResNet, ResNeXt and Wide ResNet (He et al. 2015; Xie et al. 2017; Zagoruyko and Komodakis 2016)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, chain

if TYPE_CHECKING:
    from torchvision.models import ResNet


def split(model: ResNet) -> Anatomy:
    """Groups: stem | layer1 | layer2 | layer3 | layer4 | pool."""
    groups = (
        chain("stem", model.conv1, model.bn1, model.relu, model.maxpool),
        chain("layer1", model.layer1),
        chain("layer2", model.layer2),
        chain("layer3", model.layer3),
        chain("layer4", model.layer4),
        chain("pool", model.avgpool, nn.Flatten(1)),
    )
    return Anatomy(groups, head=model.fc, head_names=("fc",), feature_dim=model.fc.in_features)
