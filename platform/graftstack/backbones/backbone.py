"""A model seen as an ordered tuple of layer groups, of which the first few can be frozen."""

from typing import Self

import torch
from torch import Tensor, nn

from graftstack.backbones.anatomy import Anatomy, LayerGroup
from graftstack.errors import ConfigError

__all__ = ["Anatomy", "Backbone", "LayerGroup", "resolve_depth"]


class Backbone(nn.Module):
    """Wraps a family's own model, unchanged, as `model`; maps images[N, 3, H, W] to features[N, feature_dim].

    The groups share the model's submodules and are not registered themselves: each parameter has one name, the
    model's own behind `model.`, and `copy.deepcopy`, `pickle` and `torch.func.functional_call` keep the sharing.

    The model's own head takes no part in `forward`. It doesn't require gradients, so that data-parallel training
    never waits for them; who trains it takes a copy of `pretrained_head`.
    """

    def __init__(self, name: str, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.name = name
        self.model = model
        # A tuple hides the modules in it from torch's registration: they are views of `model`, not more of it.
        self._anatomy = anatomy
        self._freeze_depth = 0
        self._parameter_names = _names_by_group(name, model, anatomy)
        self._buffer_names = _buffers_by_group(model, anatomy)
        for key, parameter in model.named_parameters():
            if self.is_head_key(key):
                parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, from the images on."""
        return self._anatomy.groups

    @property
    def num_groups(self) -> int:
        """How many layer groups there are."""
        return len(self.groups)

    @property
    def feature_dim(self) -> int:
        """Length of the feature vector after the last group."""
        return self._anatomy.feature_dim

    @property
    def pretrained_head(self) -> nn.Module:
        """The model's own classifier: output of group `head_boundary - 1` -> logits[N, classes]."""
        return self._anatomy.head

    @property
    def head_boundary(self) -> int:
        """How many groups run before `pretrained_head`: all of them, except in SqueezeNet."""
        boundary = self._anatomy.head_boundary
        return self.num_groups if boundary is None else boundary

    @property
    def freeze_depth(self) -> int:
        """How many leading groups are frozen."""
        return self._freeze_depth

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> features[N, feature_dim]."""
        return self.run_groups(images, 0, self.num_groups)

    def run_groups(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Runs groups `start..stop-1` on `x`, the output of group `start - 1` (images for 0).

        Frozen groups run without gradients, and so keep no activations.
        """
        thaw = min(max(self._freeze_depth, start), stop)
        with torch.no_grad():
            for group in self.groups[start:thaw]:
                x = group.module(x)
        for group in self.groups[thaw:stop]:
            x = group.module(x)
        return x

    def pretrained_logits(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> logits[N, classes] of the model's own head; in eval mode equal to `model(images)`."""
        logits: Tensor = self.pretrained_head(self.run_groups(images, 0, self.head_boundary))
        return logits

    def freeze(self, depth: int) -> None:
        """Freezes the first `depth` groups and unfreezes the others.

        A frozen group is a pure function of its input: no gradient reaches its parameters, its BatchNorm statistics
        are used and not updated, and its dropout is off, whatever `train()` is called later. Raises `ConfigError`
        for a depth outside ``0..num_groups``.
        """
        self._freeze_depth = resolve_depth(depth, self)
        for index in range(self.num_groups):
            for _, parameter in self.group_parameters(index):
                parameter.requires_grad_(index >= self._freeze_depth)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's own signature
        """Sets training mode on everything but the frozen groups, which stay in eval mode."""
        super().train(mode)
        for index, group in enumerate(self.groups):
            group.module.train(mode and index >= self._freeze_depth)
        return self

    def group_parameters(self, index: int) -> list[tuple[str, nn.Parameter]]:
        """The parameters of group `index` with the names that the wrapped model gives them."""
        return [(name, self.model.get_parameter(name)) for name in self._parameter_names[index]]

    def group_state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Parameters and buffers of groups ``start..stop-1``, by the model's own names; they share its memory."""
        state: dict[str, Tensor] = self.model.state_dict()
        names = {
            name for part in (self._parameter_names, self._buffer_names) for keys in part[start:stop] for name in keys
        }
        return {key: tensor for key, tensor in state.items() if key in names}

    def backbone_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of all but the pretrained head, by the model's own names; they share its memory."""
        state: dict[str, Tensor] = self.model.state_dict()
        return {key: tensor for key, tensor in state.items() if not self.is_head_key(key)}

    def is_head_key(self, key: str) -> bool:
        """Whether `key` of the wrapped model's state dict belongs to the pretrained head."""
        return any(key.startswith(f"{name}.") for name in self._anatomy.head_names)


def resolve_depth(freeze_depth: int | str, backbone: Backbone) -> int:
    """The number of frozen groups that `freeze_depth` stands for: a number, or `all`.

    Raises `ConfigError` for anything else, and outside ``0..num_groups``.
    """
    if freeze_depth == "all":
        return backbone.num_groups
    if isinstance(freeze_depth, int) and 0 <= freeze_depth <= backbone.num_groups:
        return int(freeze_depth)
    raise ConfigError(
        f"freeze_depth={freeze_depth}: {backbone.name} has {backbone.num_groups} layer groups; "
        f'use 0..{backbone.num_groups} or "all"'
    )


def _names_by_group(name: str, model: nn.Module, anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """The model's parameter names in each group, in the model's order.

    Names stay valid where parameters are replaced: by a copy, a move or `functional_call`.
    """
    members = [{id(p) for p in group.module.parameters()} for group in anatomy.groups]
    names: list[list[str]] = [[] for _ in anatomy.groups]
    for key, parameter in model.named_parameters():
        if any(key.startswith(f"{head}.") for head in anatomy.head_names):
            continue
        owners = [
            index for index, group in enumerate(anatomy.groups) if id(parameter) in members[index] or key in group.own
        ]
        assert len(owners) == 1, f"{name}: {key} belongs to {len(owners)} layer groups"
        names[owners[0]].append(key)
    return tuple(tuple(group) for group in names)


def _buffers_by_group(model: nn.Module, anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """The names of the model's buffers (running statistics and the like) in each group; the head's are in none."""
    members = [{id(buffer) for buffer in group.module.buffers()} for group in anatomy.groups]
    return tuple(tuple(key for key, buffer in model.named_buffers() if id(buffer) in member) for member in members)
