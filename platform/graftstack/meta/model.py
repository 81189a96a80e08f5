"""A method and the network it trains, and their state as it travels and as it is stored."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftstack.backbones.backbone import Backbone
from graftstack.backbones.registry import build
from graftstack.config.meta import MetaConfig
from graftstack.config.schema import Precision
from graftstack.meta.layout import Layout
from graftstack.meta.methods import Adapting, Embedding, head_size, make_method
from graftstack.meta.network import Network, Params
from graftstack.seeding import derive_seed

Floats = npt.NDArray[np.float32]


class MetaState(NamedTuple):
    """What the outer loop learns, as it travels between processes."""

    parameters: Floats
    """The meta-parameters, fp32 [P]."""
    statistics: Floats
    """Running means and variances of BatchNorm, fp32 [S]."""


class MetaModel:
    """The functions that a method is made of. The weights come with each call, in a `MetaState`.

    Args:
        config: The meta-training.
        image_size: Height and width of the images, in pixels.
        num_classes: Of training: finetune_baseline has a classifier over them.
        device: Where tensors lie.
        backbone: On `device`; it is taken over. None: a new one.
    """

    def __init__(
        self,
        config: MetaConfig,
        *,
        image_size: int,
        num_classes: int,
        device: torch.device,
        backbone: Backbone | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.image_size = image_size
        with torch.random.fork_rng(devices=[]):  # of a head, or a classifier over the training classes
            torch.manual_seed(derive_seed(config.seed, "meta"))
            backbone = backbone or build(config.backbone.name, image_size=image_size).to(device)
            self.network = Network(backbone, head_size=head_size(config))
            self.method = make_method(config, self.network, num_classes=num_classes)
        self._parameters = Layout(self.method.meta_parameters())
        self._statistics = Layout(self.network.statistics())

    @property
    def adapting(self) -> Adapting:
        """The method, which is one that adapts the network."""
        assert self.config.method.adapts
        return self.method  # type: ignore[return-value]

    @property
    def embedding(self) -> Embedding:
        """The method, which is one of features."""
        assert not self.config.method.adapts
        return self.method  # type: ignore[return-value]

    def arithmetic(self) -> torch.autocast:
        """Returns the precision of forward and backward passes, as a context."""
        is_bf16 = self.config.precision is Precision.bf16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def features(self, params: Params, statistics: Params, images: Tensor) -> Tensor:
        """images[N, 3, S, S] -> features[N, D], fp32 whatever the precision: distances are taken between them."""
        with self.arithmetic():
            features = self.network.features(params, statistics, images)
        return features.float() if self.config.precision is Precision.bf16 else features

    def initial(self, backbone: Backbone) -> MetaState:
        """Returns the state to begin with: the weights of `backbone`, and what the method adds to them."""
        own = {f"backbone.{name}": tensor for name, tensor in backbone.backbone_state().items()}
        parameters, statistics = self.method.meta_parameters(), self.network.statistics()
        return self.pack(parameters | _of(own, parameters), statistics | _of(own, statistics))

    def pack(self, parameters: Params, statistics: Params) -> MetaState:
        """Returns tensors as a state."""
        return MetaState(self._parameters.flat(parameters), self._statistics.flat(statistics))

    def parameters(self, state: MetaState) -> Params:
        """Returns the meta-parameters of a state by name; a copy."""
        return self.named_parameters(state.parameters)

    def statistics(self, state: MetaState) -> Params:
        """Returns the running statistics of a state by name; a copy."""
        return self.named_statistics(state.statistics)

    def named_parameters(self, vector: Floats) -> Params:
        """Returns what `flat_parameters` made a vector of; a copy, on the device."""
        return self._parameters.tensors(torch.tensor(vector, device=self.device))

    def named_statistics(self, vector: Floats) -> Params:
        """Returns what `flat_statistics` made a vector of; a copy, on the device."""
        return self._statistics.tensors(torch.tensor(vector, device=self.device))

    def flat_parameters(self, tensors: Params) -> Floats:
        """Returns tensors of the names and shapes of the meta-parameters as one vector, [P]."""
        return self._parameters.flat(tensors)

    def flat_statistics(self, tensors: Params) -> Floats:
        """Returns tensors of the names and shapes of the running statistics as one vector, [S]."""
        return self._statistics.flat(tensors)


def _of(found: Mapping[str, Tensor], wanted: Params) -> Params:
    return {name: found[name] for name in wanted if name in found}
