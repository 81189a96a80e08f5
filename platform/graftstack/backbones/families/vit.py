"""Vision Transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftstack.backbones.anatomy import Anatomy, chain
from graftstack.errors import ConfigError

if TYPE_CHECKING:
    from torchvision.models import VisionTransformer


class Embed(nn.Module):
    """images[N, 3, H, W] -> tokens[N, 1 + H * W / patch**2, D]: patches, the class token, positions.

    The class token and the positions are read from the model at each call, so that a replaced one counts.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = model.conv_proj
        self.dropout = model.encoder.dropout
        # A tuple, so that the model does not become a submodule of its own part.
        self._model = (model,)

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> tokens[N, T, D]; raises `ConfigError` for images of another size than the model's."""
        (model,) = self._model
        size = model.image_size
        if images.shape[-2:] != (size, size):
            raise ConfigError(
                f"data.image_size={images.shape[-1]}: this ViT has positions for {size}x{size} images; "
                f"use data.image_size={size}"
            )
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        class_token = model.class_token.expand(len(images), -1, -1)
        tokens: Tensor = self.dropout(torch.cat([class_token, patches], dim=1) + model.encoder.pos_embedding)
        return tokens


class ClassToken(nn.Module):
    """tokens[N, T, D] -> features[N, D]: the first token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens[N, T, D] -> features[N, D]."""
        return tokens[:, 0]


def split(model: VisionTransformer) -> Anatomy:
    """Groups: embed | block1 .. blockN | norm, which takes the class token."""
    embed = chain("embed", Embed(model))._replace(own=("class_token", "encoder.pos_embedding"))
    groups = (
        embed,
        *(chain(f"block{index}", block) for index, block in enumerate(model.encoder.layers, start=1)),
        chain("norm", model.encoder.ln, ClassToken()),
    )
    return Anatomy(groups, head=model.heads, head_names=("heads",), feature_dim=model.hidden_dim)


def current_name(key: str) -> str:
    """Some published files say `mlp.linear_1` and `mlp.linear_2` where the model says `mlp.0` and `mlp.3`."""
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
