"""A backbone with a head grafted onto it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftstack.backbones.backbone import Backbone
from graftstack.seeding import derive_seed


class GraftedModel(nn.Module):
    """Classifies images: ``head(backbone(images))``, [N, 3, S, S] fp32 normalised -> [N, num_classes].

    `head` is a new linear layer on the features of all groups, or a copy of the backbone's own, which for SqueezeNet
    takes the output of group `head_boundary - 1`.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, head_boundary: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_boundary = head_boundary

    def forward(self, values: Tensor, boundary: int = 0) -> Tensor:
        """Returns the logits of images, or of what layer group ``boundary - 1`` made of them."""
        logits: Tensor = self.head(self.backbone.run_groups(values, boundary, self.head_boundary))
        return logits

    def named_state(self, *, above: int = 0) -> dict[str, Tensor]:
        """Returns the live tensors of the model without its first `above` groups: ``backbone.NAME`` and ``head.NAME``.

        NAME is what the backbone's own library calls it; the backbone's own head has no part in the model.
        """
        frozen = self.backbone.group_state(0, above)
        state = self.backbone.backbone_state()
        backbone = {f"backbone.{name}": tensor for name, tensor in state.items() if name not in frozen}
        return backbone | {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}

    def load_named_state(self, state: Mapping[str, Tensor], *, above: int = 0) -> None:
        """Copies in what `named_state` returned. Raises `RuntimeError` where names or shapes differ."""
        backbone = self.backbone
        kept = backbone.group_state(0, above)
        own_head = {name: value for name, value in backbone.model.state_dict().items() if backbone.is_head_key(name)}
        backbone.model.load_state_dict(own_head | kept | without_prefix(state, "backbone."))
        self.head.load_state_dict(without_prefix(state, "head."))


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def graft(backbone: Backbone, *, num_classes: int, keep_head: bool, seed: int) -> GraftedModel:
    """Returns `backbone` with a new linear head, initialised from `seed`, or with a copy of its own head."""
    if keep_head:
        head = copy.deepcopy(backbone.pretrained_head).requires_grad_(requires_grad=True)
        return GraftedModel(backbone, head, head_boundary=backbone.head_boundary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        return GraftedModel(backbone, nn.Linear(backbone.feature_dim, num_classes), head_boundary=backbone.num_groups)
