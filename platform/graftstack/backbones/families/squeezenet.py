"""SqueezeNet (Iandola et al. 2016), whose head is a convolution on the map and not a layer on the pooled vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, chain, split_after_pools

if TYPE_CHECKING:
    from torchvision.models import SqueezeNet


def split(model: SqueezeNet) -> Anatomy:
    """Groups: stem | stage1 | stage2 | stage3 | pool, cut behind each max-pool; the head takes the output of stage3."""
    stem, *stages = split_after_pools(model.features)
    groups = (
        chain("stem", stem),
        *(chain(f"stage{index}", stage) for index, stage in enumerate(stages, start=1)),
        chain("pool", nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
    )
    return Anatomy(
        groups,
        head=nn.Sequential(model.classifier, nn.Flatten(1)),
        head_names=("classifier",),
        feature_dim=model.classifier[1].in_channels,
        head_boundary=len(groups) - 1,
    )
