"""Swin Transformer v1 and v2 (Liu et al. 2021, 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftstack.backbones.anatomy import Anatomy, chain, each_child

if TYPE_CHECKING:
    from torchvision.models import SwinTransformer


def split(model: SwinTransformer) -> Anatomy:
    """Groups: features.0 .. features.7 (embedding, stages and patch mergings in turn) | norm with the pooling."""
    norm = chain("norm", model.norm, model.permute, model.avgpool, model.flatten)
    groups = (*each_child("features", model.features), norm)
    return Anatomy(groups, head=model.head, head_names=("head",), feature_dim=model.head.in_features)
