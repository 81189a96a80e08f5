"""Search spaces: which values each key of a fine-tuning may take, and the fine-tuning that one choice of them makes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from graftstack.config.plain import flatten, key_types, to_plain, typed
from graftstack.config.schema import FinetuneConfig
from graftstack.errors import ConfigError, did_you_mean

_KINDS = key_types(FinetuneConfig)

# Sections that a space may call by their own name: `space.optimizer=[adamw,sgd]`.
_NAMED_SECTIONS = ("backbone", "optimizer", "schedule", "recipe")

# Keys that say where a job runs and what it keeps; they are the sweep's own.
_OF_THE_SWEEP = re.compile(r"name|resume|runs_dir|cluster|cluster\..+|checkpoint|checkpoint\..+|data\.cache_.+")

_RANGES = ("uniform", "loguniform", "randint")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Separate values, as plain as in JSON, in the order given."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return typed(list(self.values))


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, spread evenly or, with `log`, evenly over their logarithms."""

    low: float
    high: float
    """Left out of real numbers, included in whole ones."""
    log: bool = False
    integer: bool = False

    def __str__(self) -> str:
        kind = "randint" if self.integer else "loguniform" if self.log else "uniform"
        return f"{kind}({self.low},{self.high})"


Domain = Choice | Range


def parse_space(space: Mapping[str, Any]) -> dict[str, Domain]:
    """Returns the domain of each key, keys and their order as the user wrote them, nested sections as dotted keys.

    A value is a list, a scalar (the only choice), or the text of a range: ``uniform(a,b)``, ``loguniform(a,b)`` or
    ``randint(a,b)``, which includes both ends.

    Raises:
        ConfigError: an unknown key or one that no trial may have of its own, two names of one key, a value that the
            key doesn't take, or a domain with nothing in it.
    """
    domains: dict[str, Domain] = {}
    names: dict[str, str] = {}
    for name, value in flatten(space).items():
        key = full_key(name)
        if key in names:
            raise ConfigError(f"space.{name}: the same key as space.{names[key]}; leave one of them out")
        names[key] = name
        domains[name] = _domain(name, value)
    if not domains:
        raise ConfigError("space is empty: a sweep needs something to vary; add e.g. space.lr=[1e-4,1e-3,1e-2]")
    return domains


@cache
def full_key(name: str) -> str:
    """Returns the key of `FinetuneConfig` that `name` stands for.

    `name` is the dotted key, its last part where only one key ends in it (lr, image_size), or a section that is known
    by its name (backbone, optimizer, schedule, recipe).

    Raises:
        ConfigError: there is no such key, or it says where to run instead of what to train.
    """
    matches = [name] if name in _KINDS else [f"{name}.name"] if name in _NAMED_SECTIONS else _ending_in(name)
    key = matches[0] if matches else name
    if _OF_THE_SWEEP.fullmatch(key):
        raise ConfigError(
            f"space.{name}: says where trials run, not what they train; give {key}=... to the sweep itself"
        )
    if len(matches) > 1:
        raise ConfigError(f"space.{name}: several keys end in it; use one of {', '.join(matches)}")
    if not matches:
        known = [key for key in _KINDS if not _OF_THE_SWEEP.fullmatch(key)]
        known += [*_NAMED_SECTIONS, *(key.rpartition(".")[2] for key in known)]
        raise ConfigError(f"space.{name}: unknown key; {did_you_mean(name, known)}")
    return key


def trial_config(sweep: FinetuneConfig, params: Mapping[str, Any]) -> FinetuneConfig:
    """Returns the fine-tuning of one trial: the values of `sweep`, with those of `params` (name in the space -> value).

    Raises:
        ConfigError: a value that its key doesn't take, by itself or next to the others.
    """
    values = {item.name: getattr(sweep, item.name) for item in fields(FinetuneConfig)}
    in_sections: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        section, _, last = full_key(name).rpartition(".")
        (in_sections.setdefault(section, {}) if section else values)[last] = _coerced(name, value)
    try:
        for section, changes in in_sections.items():
            values[section] = replace(values[section], **changes)
        return FinetuneConfig(**values)
    except ConfigError as error:
        raise ConfigError(_blamed(str(error), params)) from error


def check_space(sweep: FinetuneConfig, domains: Mapping[str, Domain]) -> None:
    """Tries each value, and both ends of each range, beside the first values of the other keys.

    Raises:
        ConfigError: as `trial_config`.
    """
    extremes = {name: _extremes(domain) for name, domain in domains.items()}
    first = {name: values[0] for name, values in extremes.items()}
    for name, values in extremes.items():
        for value in values:
            trial_config(sweep, first | {name: value})


def grid_size(domains: Mapping[str, Domain]) -> int:
    """Returns the number of combinations.

    Raises:
        ConfigError: a key has a range, which a grid can't go through.
    """
    num = 1
    for name, domain in domains.items():
        if isinstance(domain, Range):
            raise ConfigError(f"space.{name}={domain}: search=grid needs values; give a list, or add search=random")
        num *= len(domain.values)
    return num


def _extremes(domain: Domain) -> tuple[Any, ...]:
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def _ending_in(name: str) -> list[str]:
    return [key for key in _KINDS if key.endswith(f".{name}")]


def _domain(name: str, value: Any) -> Domain:
    is_call = isinstance(value, str) and re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", value, flags=re.DOTALL)
    if is_call:
        return _range(name, value, is_call[1], is_call[2])
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ConfigError(f"space.{name}=[]: the list is empty; give it values, or leave the key out")
    plain = tuple(to_plain(_coerced(name, item)) for item in values)
    seen: set[str] = set()
    for item in plain:
        if repr(item) in seen:
            raise ConfigError(f"space.{name}: {typed(item)} is in the list twice; leave one out")
        seen.add(repr(item))
    return Choice(values=plain)


def _range(name: str, text: str, kind: str, arguments: str) -> Range:
    given = f"space.{name}={text.strip()}"
    if kind not in _RANGES:
        raise ConfigError(f"{given}: unknown range; {did_you_mean(kind, _RANGES)}")
    number = int if kind == "randint" else float
    try:
        low, high = (number(end) for end in arguments.split(","))
    except ValueError:
        what = "whole numbers" if kind == "randint" else "numbers"
        raise ConfigError(f"{given}: takes two {what}; write {kind}(low,high)") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{given}: must have finite ends; give numbers")
    if not low < high:
        raise ConfigError(f"{given}: the range is empty; write {kind}(low,high) with low < high")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{given}: a logarithm needs low > 0; raise it, or use uniform")
    _check_range(name, given, low, high)
    return Range(low=low, high=high, log=kind == "loguniform", integer=kind == "randint")


def _check_range(name: str, given: str, low: float, high: float) -> None:
    kind = _KINDS[full_key(name)]
    try:
        _fitted(low, kind)
        _fitted(high, kind)
    except ValueError:
        remedy = "write randint(low,high)" if int in _options(kind) else "give a list"
        raise ConfigError(f"{given}: the key takes {_description(kind)}; {remedy}") from None


def _coerced(name: str, value: Any) -> Any:
    """Returns a value of the space in the type of its key."""
    kind = _KINDS[full_key(name)]
    try:
        return _fitted(value, kind)
    except ValueError:
        given = f"space.{name}={typed(value)}"
        if isinstance(kind, type) and issubclass(kind, Enum):
            names = [member.value for member in kind]
            raise ConfigError(f"{given}: unknown choice; {did_you_mean(typed(value), names)}") from None
        raise ConfigError(f"{given}: the key takes {_description(kind)}; correct it") from None


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _fitted(value: Any, kind: Any) -> Any:
    """Returns `value` in the first of the types of `kind` that it has; raises `ValueError` if it has none."""
    for option in _options(kind):
        try:
            return _converted(value, option)
        except (ValueError, OverflowError):
            continue
    raise ValueError


def _converted(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if get_origin(kind) is list:
        if isinstance(value, list):
            return [_converted(item, get_args(kind)[0]) for item in value]
    elif issubclass(kind, Enum):
        return kind(value)
    elif type(value) is kind:  # exactly: True is no number
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise ValueError


def _description(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return " or ".join(names.get(option, "a list") for option in _options(kind))


def _blamed(message: str, params: Mapping[str, Any]) -> str:
    """Returns the message of an error in a trial's values with the key as it is named in the space."""
    for name, value in params.items():
        if message.startswith(f"{full_key(name)}="):
            return f"space.{name}={typed(value)}: {message.partition(': ')[2]}"
    given = " ".join(f"space.{name}={typed(value)}" for name, value in params.items())
    return f"{given}: {message}"
