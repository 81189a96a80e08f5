"""RegNet X and Y (Radosavovic et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graftstack.backbones.anatomy import Anatomy, LayerGroup, chain

if TYPE_CHECKING:
    from torchvision.models import RegNet


def split(model: RegNet) -> Anatomy:
    """Groups: stem | block1 .. block4 | pool."""
    groups = (
        chain("stem", model.stem),
        *(LayerGroup(name, block) for name, block in model.trunk_output.named_children()),
        chain("pool", model.avgpool, nn.Flatten(1)),
    )
    return Anatomy(groups, head=model.fc, head_names=("fc",), feature_dim=model.fc.in_features)
