"""Where the layer groups and the head of a model lie: what each family's `split` returns."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class LayerGroup(NamedTuple):
    """Consecutive layers that are frozen, trained and tapped together."""

    name: str
    module: nn.Module
    """Maps the output of the group before to this group's output; shares its submodules with the wrapped model and
    leaves its input as it was, so that a tap can be stored or reused."""
    own: tuple[str, ...] = ()
    """Parameters of the wrapped model that belong to the group and lie in no submodule of it, e.g. a class token."""


class Anatomy(NamedTuple):
    """A model taken apart: running the groups up to `head_boundary`, then `head`, is the model's own forward."""

    groups: tuple[LayerGroup, ...]
    head: nn.Module
    """The model's own classifier: output of group `head_boundary - 1` -> logits[N, classes]."""
    head_names: tuple[str, ...]
    """The submodules of the model, by name, whose parameters are the head's."""
    feature_dim: int
    """Length of the feature vector that the last group returns."""
    head_boundary: int | None = None
    """How many groups run before the head; None means all of them."""


def chain(name: str, *modules: nn.Module) -> LayerGroup:
    """One layer group that runs `modules` in order."""
    return LayerGroup(name, modules[0] if len(modules) == 1 else nn.Sequential(*modules))


def each_child(prefix: str, modules: nn.Module) -> tuple[LayerGroup, ...]:
    """One layer group for each child of `modules`, named `prefix.CHILD` as in the state dict."""
    return tuple(LayerGroup(f"{prefix}.{name}", child) for name, child in modules.named_children())


def split_after_pools(layers: Iterable[nn.Module]) -> list[nn.Sequential]:
    """Cuts a plain chain of layers behind each max-pool; what follows the last one is a part of its own."""
    parts: list[list[nn.Module]] = [[]]
    for layer in layers:
        parts[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            parts.append([])
    return [nn.Sequential(*part) for part in parts if part]
