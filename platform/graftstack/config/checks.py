"""Range checks for configuration values, each with an error that names the key, the value and the remedy."""

import math

from graftstack.errors import ConfigError


def at_least(key: str, value: float | None, minimum: float) -> None:
    """Raises `ConfigError` unless `value` is None, or finite and ``>= minimum``."""
    _finite(key, value)
    if value is not None and not value >= minimum:
        raise ConfigError(f"{key}={value}: must be at least {minimum}; raise it")


def at_most(key: str, value: float | None, maximum: float) -> None:
    """Raises `ConfigError` unless `value` is None or ``<= maximum``."""
    if value is not None and not value <= maximum:
        raise ConfigError(f"{key}={value}: must be at most {maximum}; lower it")


def above(key: str, value: float | None, bound: float) -> None:
    """Raises `ConfigError` unless `value` is None, or finite and ``> bound``."""
    _finite(key, value)
    if value is not None and not value > bound:
        raise ConfigError(f"{key}={value}: must be greater than {bound}; raise it")


def fraction(key: str, value: float, *, low: float = 0.0, high: float = 1.0) -> None:
    """Raises `ConfigError` unless ``low <= value < high``."""
    if not low <= value < high:
        raise ConfigError(f"{key}={value}: must lie in [{low}, {high}); choose a value in that range")


def _finite(key: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number; give one")
