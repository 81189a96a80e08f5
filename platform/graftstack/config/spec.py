"""A job as a file: what travels to where it runs, so that no shell and no parser comes between a value and the job."""

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any, Union, get_args, get_origin

from graftstack.config.jobs import JOBS
from graftstack.config.plain import from_plain
from graftstack.config.schema import JobConfig
from graftstack.errors import ConfigError, did_you_mean
from graftstack.reason import reason

_FORMAT = 1

# JSON has names for keys and nothing else; a mapping of the user's with other keys becomes a list of pairs.
_PAIRS = "$pairs"

_DIGEST_LENGTH = 10


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A job with all that it takes to run it elsewhere, once or again."""

    job: str
    """One of `JOBS`."""
    config: JobConfig
    """Resolved. It has a name and resumes: whoever runs it a second time goes on, or finds the run done."""
    overrides: list[str] = field(default_factory=list)
    """The configuration as the user wrote it, which the run's manifest keeps."""

    def __post_init__(self) -> None:
        if self.job not in JOBS:
            raise ConfigError(f"job={self.job}: unknown; {did_you_mean(self.job, JOBS)}")
        if type(self.config) is not JOBS[self.job]:
            raise ConfigError(f"config: isn't the configuration of a {self.job} job; give that of one")
        if self.config.name is None or not self.config.resume:
            raise ConfigError("config: what may run twice needs a name and resume=true; set both")


def to_bytes(spec: Spec) -> bytes:
    """Returns the file of a spec: JSON in ASCII, the same bytes for the same spec.

    Sections have their keys in alphabetical order. Mappings that the user made up keep their own, which may mean
    something: it is the order of trials.
    """
    content = {
        "config": _encoded(spec.config),
        "job": spec.job,
        "overrides": spec.overrides,
        "spec": _FORMAT,
    }
    return (json.dumps(content, indent=2) + "\n").encode("ascii")


def from_bytes(content: bytes) -> Spec:
    """Returns the spec in a file. Raises `ConfigError` for what isn't one, or one of another version."""
    try:
        found = json.loads(content.decode())
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ConfigError(f"no spec: it isn't JSON ({reason(error)}); write one with graftstack submit") from error
    if not isinstance(found, dict) or found.keys() != {"config", "job", "overrides", "spec"}:
        raise ConfigError("no spec: config, job, overrides and spec are its keys; write one with graftstack submit")
    if found["spec"] != _FORMAT:
        raise ConfigError(f"spec={found['spec']}: this version reads {_FORMAT}; use the graftstack that wrote it")
    job, overrides = found["job"], found["overrides"]
    _check(str, job, "job")
    _check(list[str], overrides, "overrides")
    if job not in JOBS:
        raise ConfigError(f"job={job}: unknown; {did_you_mean(job, JOBS)}")
    try:
        plain = _decoded(found["config"])
        _check(JOBS[job], plain, "config")
        return Spec(job=job, config=from_plain(JOBS[job], plain), overrides=overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config: can't be read ({reason(error)}); write it anew with graftstack submit") from error


def run_name(job: str, config: JobConfig) -> str:
    """Returns the name that the user gave the run, or one that follows from all that the configuration says."""
    if config.name is not None:
        return config.name
    content = json.dumps(_encoded(replace(config, resume=False)))
    return f"{job}-{hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_LENGTH]}"


def _encoded(value: Any) -> Any:
    """Returns a value of a configuration as JSON has it."""
    if is_dataclass(value):
        return {name: _encoded(getattr(value, name)) for name in sorted(item.name for item in fields(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != _PAIRS for key in value):
            return {key: _encoded(item) for key, item in value.items()}
        return {_PAIRS: [[key, _encoded(item)] for key, item in value.items()]}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_PAIRS}:
            return {key: _decoded(item) for key, item in value[_PAIRS]}
        return {key: _decoded(item) for key, item in value.items()}
    return value


def _check(kind: Any, value: Any, key: str) -> None:
    """Raises `ConfigError` where a value isn't of its type, or a key is unknown: a later version may have added it."""
    if isinstance(kind, type) and is_dataclass(kind):
        _check_type(isinstance(value, dict), value, key, "a section")
        known = {item.name: item.type for item in fields(kind)}
        for name, inner in value.items():
            if name not in known:
                raise ConfigError(f"{key}.{name}: unknown key; use the graftstack that wrote it, or leave it out")
            _check(known[name], inner, f"{key}.{name}")
    elif get_origin(kind) is list:
        _check_type(isinstance(value, list), value, key, "a list")
        for index, inner in enumerate(value):
            _check(get_args(kind)[0], inner, f"{key}[{index}]")
    else:
        _check_type(_fits(kind, value), value, key, getattr(kind, "__name__", str(kind)))


def _check_type(is_right: bool, value: Any, key: str, wanted: str) -> None:  # noqa: FBT001 - the condition itself
    if not is_right:
        raise ConfigError(f"{key}={value!r}: isn't {wanted}; correct it")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a type that isn't a section or a list."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(one, value) for one in get_args(kind))
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is Any:
        return True
    if issubclass(kind, Enum):
        return value in [member.value for member in kind]
    if kind in (int, float):  # a truth value is a number to Python alone
        return not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
    return isinstance(value, kind)
