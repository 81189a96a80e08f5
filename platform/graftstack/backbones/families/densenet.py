"""DenseNet (Huang et al. 2017)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, chain

if TYPE_CHECKING:
    from torchvision.models import DenseNet


def split(model: DenseNet) -> Anatomy:
    """Groups: stem | denseblock1 .. denseblock4, each with the transition behind it | pool with the final norm."""
    parts = dict(model.features.named_children())
    blocks = (
        chain(f"denseblock{k}", *(parts[part] for part in (f"denseblock{k}", f"transition{k}") if part in parts))
        for k in range(1, 5)
    )
    groups = (
        chain("stem", *(parts[part] for part in ("conv0", "norm0", "relu0", "pool0"))),
        *blocks,
        chain("pool", parts["norm5"], nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
    )
    return Anatomy(groups, head=model.classifier, head_names=("classifier",), feature_dim=model.classifier.in_features)


def current_name(key: str) -> str:
    """The published files say `denselayer1.norm.1.weight` where the model says `denselayer1.norm1.weight`."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", key)
