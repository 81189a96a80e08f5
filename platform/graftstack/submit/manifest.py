"""Objects of Kubernetes as frozen dataclasses: to the plain values of YAML, and back with all that is wrong.

A class lists the fields it knows, in the order in which they are written. One that stands for an object of Ray's own is
closed: another field is a mistake. One of Kubernetes' own has many more, and keeps those in `rest`.
"""

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from graftstack.errors import did_you_mean

T = TypeVar("T")

REST = "rest"

# Names that aren't those of their field in camel case.
_SPELT = {"runtime_env_yaml": "runtimeEnvYAML"}


class Finding(NamedTuple):
    """What is wrong with a manifest."""

    path: str
    """Of the field: ``spec.rayClusterSpec.headGroupSpec.rayStartParams``."""
    message: str
    """The rule and the value, in one line."""
    fix: str
    """What to do, in one line."""
    is_advice: bool = False
    """The cluster would take it as it is."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}; {self.fix}"


class Parsed(NamedTuple):
    """An object as it was understood, and what wasn't."""

    value: Any
    findings: list[Finding]


def to_manifest(value: Any) -> Any:
    """Returns plain values; fields that are None aren't there."""
    if is_dataclass(value):
        known = {
            spelt(item.name): to_manifest(getattr(value, item.name))
            for item in fields(value)
            if item.name != REST and getattr(value, item.name) is not None
        }
        return known | dict(getattr(value, REST, {}))
    if isinstance(value, Mapping):
        return {key: to_manifest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_manifest(item) for item in value]
    return value


def from_manifest(kind: Any, value: Any, path: str = "") -> Parsed:
    """Returns `value` as an object of the class `kind`; a field that can't be read is None, and a finding."""
    findings: list[Finding] = []
    return Parsed(_read(kind, value, path, findings), findings)


def to_yaml(*manifests: Any) -> str:
    """Returns manifests as YAML documents, the same bytes every time; texts of several lines stay so."""
    text: str = yaml.dump_all(
        manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31, explicit_start=len(manifests) > 1
    )
    return text


@cache
def spelt(name: str) -> str:
    """Returns the name of a field as manifests have it: ``ray_version`` is ``rayVersion``."""
    head, *others = name.split("_")
    return _SPELT.get(name) or head + "".join(part[0].upper() + part[1:] for part in others)


def join(path: str, key: str) -> str:
    """Returns the path of a field within an object; a key that isn't a plain word is quoted."""
    if not re.fullmatch(r"[\w-]+", key):
        return f'{path}["{key}"]'
    return f"{path}.{key}" if path else key


class _Dumper(yaml.SafeDumper):
    """Writes no anchors for what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _read(kind: Any, value: Any, path: str, findings: list[Finding]) -> Any:
    kind = _without_none(kind)
    if value is None or kind is Any:
        return value
    if is_dataclass(kind):
        return _read_object(kind, value, path, findings)
    arguments = get_args(kind)
    match get_origin(kind), value:
        case origin, list() if origin is list:
            return [_read(arguments[0], item, f"{path}[{index}]", findings) for index, item in enumerate(value)]
        case origin, dict() if origin is dict:
            return {str(key): _read(arguments[1], item, join(path, str(key)), findings) for key, item in value.items()}
    if (fault := _fault(kind, value)) is None:
        return value
    findings.append(Finding(path, *fault))
    return None


def _fault(kind: Any, value: Any) -> tuple[str, str] | None:
    """Returns why a value of YAML isn't one of the type `kind`, and what to write; None if it is one."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return None if value in arguments else (f"{_shown(value)} is no word for it", f"use {', '.join(arguments)}")
    accepted, remedy = _plain_kind(kind)
    if isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool)):
        return None
    return f"{_shown(value)} has the wrong type", f"give {remedy}"


def _read_object(kind: Any, value: Any, path: str, findings: list[Finding]) -> Any:
    if not isinstance(value, dict):
        findings.append(Finding(path, f"{_shown(value)} has the wrong type", "give an object, KEY: VALUE"))
        return None
    names = dict(_names(kind))
    known = {str(key): item for key, item in value.items() if key in names}
    unknown = {str(key): item for key, item in value.items() if key not in names}
    hints = _hints(kind)
    read = {
        names[key].name: _read(hints[names[key].name], item, join(path, key), findings) for key, item in known.items()
    }
    if REST in hints:
        return kind(**read, rest=unknown)
    for key in unknown:
        moved = _moved(kind).get(key)
        fix = moved or did_you_mean(key, names)
        findings.append(Finding(join(path, key), "there is no such field", fix))
    return kind(**read)


def _names(kind: Any) -> Iterator[tuple[str, Field[Any]]]:
    return ((spelt(item.name), item) for item in fields(kind) if item.name != REST)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _moved(kind: Any) -> Mapping[str, str]:
    """Fields of other versions, and what took their place."""
    moved: Mapping[str, str] = getattr(kind, "MOVED", {})
    return moved


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        others = [item for item in get_args(kind) if item is not type(None)]
        return others[0] if len(others) == 1 else Union[tuple(others)]  # noqa: UP007
    return kind


def _plain_kind(kind: Any) -> tuple[tuple[type, ...], str]:
    """Returns the types of YAML's values that a field takes, and what to write."""
    if get_origin(kind) is Union:
        return get_args(kind), "an amount, such as 500m or 16Gi"
    return {
        str: ((str,), "a text; put it in quotes"),
        int: ((int,), "a whole number, without quotes"),
        float: ((int, float), "a number, without quotes"),
        bool: ((bool,), "true or false, without quotes"),
    }.get(kind, ((get_origin(kind) or kind,), "a list" if get_origin(kind) is list else "an object, KEY: VALUE"))


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
