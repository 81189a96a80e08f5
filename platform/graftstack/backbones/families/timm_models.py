"""Any image model of timm, as `timm/NAME`; needs the extra `timm`.

timm's models share `forward_features`, `forward_head(pre_logits=True)` and `get_classifier`, not a layout. The groups
follow the usual one: a stem, stages, and pooling. They are kept only if on a small random image they give the
model's own logits bit for bit; otherwise the whole model before its classifier is one group.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftstack.backbones.anatomy import Anatomy, LayerGroup, chain, each_child
from graftstack.backbones.catalog import TIMM_PREFIX
from graftstack.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

STAGE = re.compile(r"layer\d+|stage\d*|s\d+|block\d+|blocks|stages|layers|features")
EXPANDED = {"blocks", "stages", "layers"}
"""Containers of which each child is a group; other stages are one group each."""
TAIL = {"global_pool", "pool", "attn_pool", "fc_norm", "head_drop", "head", "fc", "classifier"}
"""From the first of these children on, a model is what `forward_head` runs."""
PROBE_SIZE = 96
"""Height and width in pixels of the image that checks the groups, where a model takes any size."""


class Embed(nn.Module):
    """images[N, 3, H, W] -> tokens[N, T, D] of a transformer; `parts` are the submodules it runs."""

    def __init__(self, model: Any, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # A tuple, so that the model does not become a submodule of its own part.
        self._model = (model,)

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> tokens[N, T, D]."""
        (model,) = self._model
        positioned = model._pos_embed(model.patch_embed(images))  # noqa: SLF001 - timm has no public name for it
        tokens: Tensor = model.norm_pre(model.patch_drop(positioned))
        return tokens


class Tail(nn.Module):
    """Output of the last stage -> features[N, D]: `norms`, then all of `forward_head` but the classifier."""

    def __init__(self, model: Any, norms: Iterable[nn.Module], parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.Sequential(*norms)
        self.parts = nn.ModuleList(parts)
        self._model = (model,)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the last stage -> features[N, D]."""
        (model,) = self._model
        features: Tensor = model.forward_head(self.norms(x), pre_logits=True)
        return features


class Whole(nn.Module):
    """images[N, 3, H, W] -> features[N, D] in one go; `parts` are all submodules but the classifier."""

    def __init__(self, model: Any, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._model = (model,)

    def forward(self, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> features[N, D]."""
        (model,) = self._model
        features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        return features


def make(name: str, num_classes: int | None = None) -> nn.Module:
    """The timm model, randomly initialised; raises `ConfigError` where timm or the model is missing."""
    pretrained_config(name)
    model: nn.Module = _timm(name).create_model(name.removeprefix(TIMM_PREFIX), num_classes=num_classes)
    return model


def pretrained_config(name: str) -> Any:
    """What timm knows of the model's published weights: `input_size`, `mean`, `std`.

    Raises `ConfigError` where timm, the model or the tag behind the dot is missing.
    """
    timm = _timm(name)
    model_name = name.removeprefix(TIMM_PREFIX)
    architecture = model_name.split(".")[0]
    if not timm.is_model(architecture):
        raise ConfigError(f"backbone={name}: timm has no such model; {did_you_mean(architecture, timm.list_models())}")
    try:
        config = timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        tag = model_name.partition(".")[2]
        raise ConfigError(f"backbone={name}: timm has no such weights; {did_you_mean(tag, tags)}") from error
    if config is None:
        raise ConfigError(f"backbone={name}: timm says nothing about its input; use another model")
    return config


def split(model: Any) -> Anatomy:
    """Stem | stages | pool where the model is built so, else one group; raises `ConfigError` if neither fits."""
    head = model.get_classifier()
    if not isinstance(head, nn.Module):
        raise ConfigError(f"backbone: timm's {type(model).__name__} has several heads or none; use another model")
    head_names = tuple(name for name, module in model.named_modules() if module is head)
    for groups in (_stages(model, head), _whole(model, head)):
        feature_dim = _checked_feature_dim(model, groups, head)
        if feature_dim is not None:
            return Anatomy(groups, head=head, head_names=head_names, feature_dim=feature_dim)
    raise ConfigError(f"backbone: timm's {type(model).__name__} doesn't classify one feature vector; use another model")


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"backbone={name}: timm is not installed; pip install 'graftstack[timm]'") from error
    return timm


def _stages(model: Any, head: nn.Module) -> tuple[LayerGroup, ...]:
    """The usual layout by the names of the model's children; empty where no child is a stage."""
    children = dict(model.named_children())
    names = list(children)
    num_trunk = next((index for index, name in enumerate(names) if name in TAIL), len(names))
    trunk, tail = names[:num_trunk], names[num_trunk:]
    stages = [index for index, name in enumerate(trunk) if STAGE.fullmatch(name)]
    if not stages:
        return ()
    stem = [children[name] for name in trunk[: stages[0]]]
    loose = tuple(name for name, _ in model.named_parameters(recurse=False))
    groups = [LayerGroup("stem", nn.Sequential(*stem))] if stem else []
    if hasattr(model, "_pos_embed"):
        groups = [LayerGroup("embed", Embed(model, stem), own=loose)]
    for name in trunk[stages[0] : stages[-1] + 1]:
        groups += each_child(name, children[name]) if name in EXPANDED else [chain(name, children[name])]
    norms = [children[name] for name in trunk[stages[-1] + 1 :]]
    parts, own = _without_head([(name, children[name]) for name in tail], head)
    return (*groups, LayerGroup("pool", Tail(model, norms, parts), own=own))


def _whole(model: Any, head: nn.Module) -> tuple[LayerGroup, ...]:
    parts, own = _without_head(list(model.named_children()), head)
    loose = tuple(name for name, _ in model.named_parameters(recurse=False))
    return (LayerGroup("features", Whole(model, parts), own=(*loose, *own)),)


def _without_head(modules: list[tuple[str, nn.Module]], head: nn.Module) -> tuple[list[nn.Module], tuple[str, ...]]:
    """The largest submodules that don't contain `head`, and the parameters that lie directly in one that does."""
    parts: list[nn.Module] = []
    own: list[str] = []
    queue = list(modules)
    while queue:
        name, module = queue.pop(0)
        if module is head:
            continue
        if all(inner is not head for inner in module.modules()):
            parts.append(module)
            continue
        own += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        queue += [(f"{name}.{key}", child) for key, child in module.named_children()]
    return parts, tuple(own)


@torch.no_grad()
def _checked_feature_dim(model: Any, groups: tuple[LayerGroup, ...], head: nn.Module) -> int | None:
    """Length of the feature vector, or None unless the groups are pure and give the model's logits bit for bit."""
    if not groups or not _covers(model, groups, head):
        return None
    training = model.training
    model.eval()
    try:
        images = _probe(model)
        x = images
        for group in groups:
            before = x.clone()
            x, given = group.module(x), x
            if not isinstance(x, Tensor) or not torch.equal(given, before):
                return None
        fits = x.ndim == 2 and torch.equal(head(x), model(images))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, AssertionError):
        # Whatever a layout that is not the model's stumbles over, the answer is that it doesn't fit.
        return None
    finally:
        model.train(training)
    return x.shape[1] if fits else None


def _covers(model: Any, groups: tuple[LayerGroup, ...], head: nn.Module) -> bool:
    """Whether each parameter before the head belongs to exactly one group."""
    owned = [id(p) for group in groups for p in group.module.parameters()]
    owned += [id(model.get_parameter(name)) for group in groups for name in group.own]
    at_head = {id(p) for p in head.parameters()}
    return sorted(owned) == sorted(id(p) for p in model.parameters() if id(p) not in at_head)


def _probe(model: Any) -> Tensor:
    """images[1, 3, S, S] of the smallest of two sizes that the model takes; leaves torch's random stream alone."""
    channels, full, _ = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1, channels, min(full, PROBE_SIZE), min(full, PROBE_SIZE), generator=generator)
    try:
        model(small)
    except (RuntimeError, AssertionError, ValueError):
        return torch.rand(1, channels, full, full, generator=generator)
    return small
