"""The methods of meta-learning: one file and one line here for each.

- `protocols`: what a method is; `inner_defaults`: learning rates and steps that suit each
- metric: `prototypes`, `supcon`, `triplet`, on features alone; `nearest_neighbour` beside them; `metric_learning`: the
  library that two of them take their losses from
- optimisers: `maml`, `fomaml`, `anil`, `reptile`, `meta_sgd`, which adapt the network itself
- `finetune_baseline`: a classifier over all training classes, and a new one for new classes
"""

from collections.abc import Callable
from typing import Final

from graftstack.config.meta import MetaConfig, MethodName
from graftstack.meta.methods.anil import Anil
from graftstack.meta.methods.finetune_baseline import FinetuneBaseline
from graftstack.meta.methods.fomaml import FirstOrderMaml
from graftstack.meta.methods.inner_defaults import INNER_DEFAULTS, InnerSettings, inner_settings
from graftstack.meta.methods.maml import Maml
from graftstack.meta.methods.meta_sgd import MetaSgd
from graftstack.meta.methods.nearest_neighbour import nearest_neighbour
from graftstack.meta.methods.protocols import Adapting, Embedding, EmbeddingLoss, Outcome, Prediction
from graftstack.meta.methods.prototypes import Prototypes
from graftstack.meta.methods.reptile import Reptile
from graftstack.meta.methods.supcon import SupCon
from graftstack.meta.methods.triplet import Triplet
from graftstack.meta.network import Network

__all__ = [
    "INNER_DEFAULTS",
    "METHODS",
    "Adapting",
    "Embedding",
    "EmbeddingLoss",
    "InnerSettings",
    "Outcome",
    "Prediction",
    "head_size",
    "inner_settings",
    "make_method",
    "nearest_neighbour",
]

Method = Adapting | Embedding

METHODS: Final[dict[MethodName, Callable[[MetaConfig, Network, int], Method]]] = {
    MethodName.prototypes: lambda _, network, __: Prototypes(network),
    MethodName.supcon: lambda config, network, _: SupCon(network, temperature=config.temperature),
    MethodName.triplet: lambda config, network, _: Triplet(network, margin=config.margin),
    MethodName.finetune_baseline: lambda config, network, num_classes: FinetuneBaseline(
        network, inner_settings(config), num_classes=num_classes
    ),
    MethodName.maml: lambda config, network, _: Maml(network, inner_settings(config), config.eval.batchnorm),
    MethodName.fomaml: lambda config, network, _: FirstOrderMaml(
        network, inner_settings(config), config.eval.batchnorm
    ),
    MethodName.anil: lambda config, network, _: Anil(network, inner_settings(config), config.eval.batchnorm),
    MethodName.reptile: lambda config, network, _: Reptile(
        network, inner_settings(config), config.eval.batchnorm, batch_size=config.inner_batch_size
    ),
    MethodName.meta_sgd: lambda config, network, _: MetaSgd(network, inner_settings(config), config.eval.batchnorm),
}


def make_method(config: MetaConfig, network: Network, *, num_classes: int) -> Method:
    """Returns the method of a configuration.

    Args:
        config: Names the method.
        network: With a head of `head_size` outputs.
        num_classes: Of training.

    Raises:
        ConfigError: a library that the method needs isn't installed.
    """
    return METHODS[config.method](config, network, num_classes)


def head_size(config: MetaConfig) -> int | None:
    """Returns the outputs of the network's head: the classes of an episode where the method adapts it, else none."""
    return config.num_ways if config.method.adapts else None
