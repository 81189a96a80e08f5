"""ShuffleNetV2 (Ma et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftstack.backbones.anatomy import Anatomy, chain
from graftstack.backbones.families.mobilenet import GlobalMean

if TYPE_CHECKING:
    from torchvision.models import ShuffleNetV2


def split(model: ShuffleNetV2) -> Anatomy:
    """Groups: stem | stage2 | stage3 | stage4 | conv5 | pool."""
    groups = (
        chain("stem", model.conv1, model.maxpool),
        chain("stage2", model.stage2),
        chain("stage3", model.stage3),
        chain("stage4", model.stage4),
        chain("conv5", model.conv5),
        chain("pool", GlobalMean()),
    )
    return Anatomy(groups, head=model.fc, head_names=("fc",), feature_dim=model.fc.in_features)
