"""MobileNetV2 (Sandler et al. 2018), MobileNetV3 (Howard et al. 2019) and MNASNet (Tan et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from graftstack.backbones.anatomy import Anatomy, chain, each_child

if TYPE_CHECKING:
    from torchvision.models import MNASNet, MobileNetV2, MobileNetV3


class GlobalMean(nn.Module):
    """x[N, C, H, W] -> x[N, C]: the mean over the map, which rounds differently from adaptive pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """x[N, C, H, W] -> x[N, C]."""
        return x.mean([2, 3])


def split_v2(model: MobileNetV2) -> Anatomy:
    """Groups: features.0 .. features.18 | pool."""
    groups = (*each_child("features", model.features), chain("pool", nn.AdaptiveAvgPool2d(1), nn.Flatten(1)))
    return Anatomy(groups, head=model.classifier, head_names=("classifier",), feature_dim=model.last_channel)


def split_v3(model: MobileNetV3) -> Anatomy:
    """Groups: features.0 .. | pool | fc (the classifier's hidden layer); the head is dropout and the last layer."""
    groups = (
        *each_child("features", model.features),
        chain("pool", model.avgpool, nn.Flatten(1)),
        chain("fc", *model.classifier[:2]),
    )
    head = model.classifier[2:]
    return Anatomy(groups, head=head, head_names=("classifier.3",), feature_dim=model.classifier[0].out_features)


def split_mnasnet(model: MNASNet) -> Anatomy:
    """Groups: stem (to the separable convolution) | six stacks of inverted residuals | conv | pool."""
    layers = model.layers
    groups = (
        chain("stem", *layers[:8]),
        *(chain(f"layers.{index}", layers[index]) for index in range(8, 14)),
        chain("conv", *layers[14:]),
        chain("pool", GlobalMean()),
    )
    feature_dim = model.classifier[1].in_features
    return Anatomy(groups, head=model.classifier, head_names=("classifier",), feature_dim=feature_dim)
