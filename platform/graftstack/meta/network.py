"""A backbone as pure functions of its parameters."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from graftstack.backbones.backbone import Backbone
from graftstack.finetune.model import without_prefix
from graftstack.meta.batchnorm import Found

Params = dict[str, Tensor]
"""Tensors by name: ``backbone.NAME``, as the backbone's own library calls it, ``head.weight`` and ``head.bias``."""


class Network:
    """A backbone, and a linear head on its features if there is one, as pure functions of their parameters.

    The names are those of `GraftedModel.named_state`, so that what is learnt loads as weights of the backbone. The
    backbone is in eval mode throughout: dropout is off, and BatchNorm uses `statistics`, or the moments of the batch
    inside `batch_statistics`.

    Args:
        backbone: It is taken over; it lies on the device on which the functions are called.
        head_size: Outputs of the head, whose weights come from torch's current random stream; None: there is no head.
    """

    def __init__(self, backbone: Backbone, *, head_size: int | None) -> None:
        backbone.freeze(0)
        self._backbone = backbone.eval()
        self._head = None if head_size is None else nn.Linear(backbone.feature_dim, head_size)
        layers = {name: each for name, each in backbone.model.named_modules() if isinstance(each, _BatchNorm)}
        self._momenta: dict[str, float] = {}
        for name, each in layers.items():
            assert each.momentum is not None, f"{backbone.name}: {name} counts its batches, of which no one keeps count"
            self._momenta[f"backbone.{name}"] = each.momentum
        self.feature_dim = backbone.feature_dim

    @property
    def has_batchnorm(self) -> bool:
        """Whether an image's features can depend on the other images of its batch."""
        return bool(self._momenta)

    def parameters(self) -> Params:
        """Returns copies of the parameters; the backbone's own head has no part in them."""
        groups = range(self._backbone.num_groups)
        own = {name: tensor for index in groups for name, tensor in self._backbone.group_parameters(index)}
        params = {f"backbone.{name}": tensor.detach().clone() for name, tensor in own.items()}
        if self._head is not None:
            like = next(iter(params.values()))
            params |= {
                f"head.{name}": tensor.detach().to(like, copy=True) for name, tensor in self._head.named_parameters()
            }
        return params

    def statistics(self) -> Params:
        """Returns copies of the backbone's floating-point buffers: running means and variances."""
        model = self._backbone.model
        own = self._backbone.backbone_state().keys() & dict(model.named_buffers()).keys()
        buffers = {name: model.get_buffer(name) for name in sorted(own)}
        return {f"backbone.{name}": tensor.clone() for name, tensor in buffers.items() if tensor.is_floating_point()}

    def constants(self) -> Params:
        """Returns copies of the backbone's other buffers, which no training changes: tables of positions, counters."""
        own = self._backbone.backbone_state()
        return {f"backbone.{name}": tensor.clone() for name, tensor in own.items() if not tensor.is_floating_point()}

    def features(self, params: Params, statistics: Params, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> features[N, feature_dim]."""
        named = {**_of_model(params), **_of_model(statistics)}
        features: Tensor = functional_call(self._backbone, named, (images,))
        return features

    def head(self, params: Params, features: Tensor) -> Tensor:
        """features[N, feature_dim] -> logits[N, head_size]."""
        return F.linear(features, params["head.weight"], params["head.bias"])

    def logits(self, params: Params, statistics: Params, images: Tensor) -> Tensor:
        """images[N, 3, H, W] -> logits[N, head_size]."""
        return self.head(params, self.features(params, statistics, images))

    def moments(self, statistics: Params, found: Found) -> Params:
        """Returns what `batch_statistics` found while `features` ran on these `statistics`, by the same names.

        Buffers that are no running averages are returned as they are.
        """
        moments = dict(statistics)
        for layer in self._momenta:
            mean, variance = f"{layer}.running_mean", f"{layer}.running_var"
            own = found.get(id(statistics.get(mean)))
            if own is not None:
                moments |= {mean: own.mean, variance: own.variance}
        return moments

    def updated(self, statistics: Params, moments: Params) -> Params:
        """Returns the running averages after one more batch, by BatchNorm's own rule."""
        updated = dict(statistics)
        for layer, momentum in self._momenta.items():
            for name in (f"{layer}.running_mean", f"{layer}.running_var"):
                if name in statistics:
                    updated[name] = (1 - momentum) * statistics[name] + momentum * moments[name]
        return updated


def _of_model(tensors: Params) -> Params:
    """Names tensors as `Backbone` does."""
    return {f"model.{name}": tensor for name, tensor in without_prefix(tensors, "backbone.").items()}
