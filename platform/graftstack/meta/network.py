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
        self._layers = {
            f"backbone.{name}": module
            for name, module in backbone.model.named_modules()
            if isinstance(module, _BatchNorm)
        }
        self.feature_dim = backbone.feature_dim

    @property
    def has_batchnorm(self) -> bool:
        """Whether an image's features can depend on the other images of its batch."""
        return bool(self._layers)

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
        for layer in self._layers:
            mean = statistics.get(f"{layer}.running_mean")
            if id(mean) in found:
                moments |= {
                    f"{layer}.running_mean": found[id(mean)].mean,
                    f"{layer}.running_var": found[id(mean)].variance,
                }
        return moments

    def updated(self, statistics: Params, moments: Params) -> Params:
        """Returns the running averages after one more batch, as BatchNorm's own rule has it."""
        momenta = {
            f"{layer}.running_{of}": module.momentum for layer, module in self._layers.items() for of in ("mean", "var")
        }
        return {
            name: (1 - momenta[name]) * tensor + momenta[name] * moments[name] if name in momenta else tensor
            for name, tensor in statistics.items()
        }


def _of_model(tensors: Params) -> Params:
    """Names tensors as `Backbone` does."""
    return {f"model.{name}": tensor for name, tensor in without_prefix(tensors, "backbone.").items()}
