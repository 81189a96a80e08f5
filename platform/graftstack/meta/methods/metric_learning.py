"""pytorch-metric-learning, which not every installation has, and which takes half a second to load."""

from importlib import import_module
from typing import Any

from graftstack.config.meta import MethodName
from graftstack.errors import ConfigError
from graftstack.reason import reason


def metric_learning(module: str, method: MethodName) -> Any:
    """Returns ``pytorch_metric_learning.MODULE``. Raises `ConfigError` if the library isn't installed."""
    try:
        return import_module(f"pytorch_metric_learning.{module}")
    except ImportError as error:
        raise ConfigError(
            f"method={method.value}: pytorch-metric-learning isn't installed ({reason(error)}); run "
            "pip install 'graftstack[metric]'"
        ) from error
