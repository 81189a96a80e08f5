"""A configuration as plain values, for JSON and YAML, and its keys as they are typed."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def to_plain(config: object) -> Any:
    """Returns a configuration as plain dictionaries, lists and scalars, as written to JSON and YAML."""
    if is_dataclass(config):
        return {item.name: to_plain(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, list):
        return [to_plain(item) for item in config]
    return config


def from_plain(config_type: type[T], values: Mapping[str, Any]) -> T:
    """Returns the configuration of which `to_plain` made `values`; what they don't say has its default.

    Raises `ConfigError` as the configuration does, and `ValueError` for a word that isn't among those of its key.
    """
    restored: T = _restored(config_type, values)
    return restored


def _restored(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        given = [item for item in fields(kind) if item.name in value]
        return kind(**{item.name: _restored(item.type, value[item.name]) for item in given})
    return kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value


def to_yaml(config: object) -> str:
    """Returns a configuration as YAML."""
    text: str = yaml.safe_dump(to_plain(config), sort_keys=False)
    return text


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def key_types(config_type: type, prefix: str = "") -> Mapping[str, Any]:
    """Returns every key of a configuration dataclass and the type of its value, sections expanded."""
    found: dict[str, Any] = {}
    for item in fields(config_type):
        is_section = isinstance(item.type, type) and is_dataclass(item.type)
        key = f"{prefix}{item.name}"
        found |= key_types(item.type, f"{key}.") if is_section else {key: item.type}  # type: ignore[arg-type]
    return found


def typed(value: Any) -> str:
    """Returns a value as it would be typed after ``key=``."""
    if isinstance(value, Enum):
        return str(value.value)
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
