"""The entries of `base_models`: what each says, checked as far as that goes without scikit-learn or torch."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from graftstack.config.plain import flatten
from graftstack.config.schema import FinetuneConfig
from graftstack.config.space import full_key, trial_config
from graftstack.errors import ConfigError

FINETUNE, PROBE = "finetune", "probe"

RUN_PREFIX = "run:"

OF_A_PROBE = ("estimator", "params")
"""What the entry of a probe says beside the keys of its backbone."""

_FORMS = "write NAME, {NAME: {PARAMETER: value}}, {finetune: {KEY: value}}, {probe: {KEY: value}} or run:RUN"

# What becomes part of a file name, 255 bytes at most, and of a column's.
_NAME = re.compile(r"[\w+-][\w.+-]{0,59}")

# Columns of out-of-fold predictions beside those of base models.
_TAKEN = ("row_id", "label", "fold", "stack")


class BaseEntry(NamedTuple):
    """One base model as the user wrote it."""

    name: str
    """Of the base model: in tables, columns and errors."""
    kind: str
    """finetune, probe, ``run:RUN``, or the name of an estimator."""
    params: dict[str, Any]
    """Keys of a fine-tuning, or parameters of the estimator."""

    @property
    def takes_images(self) -> bool:
        """Whether it learns from images and no table will do."""
        return self.kind in (FINETUNE, PROBE) or self.kind.startswith(RUN_PREFIX)


def parse_entries(key: str, entries: Sequence[Any]) -> list[BaseEntry]:
    """Returns the base models of a level.

    Args:
        key: How errors call the list, e.g. ``base_models``.
        entries: As the user wrote them.

    Raises:
        ConfigError: an entry of no known form, or a name that two of them have.
    """
    found = [_parsed(key, entry) for entry in entries]
    names = [entry.name for entry in found]
    for entry in found:
        if names.count(entry.name) > 1:
            raise ConfigError(
                f"{key}: two base models are called {entry.name}; give one another name, as in "
                f"{{{_escaped(entry.kind)}:{{name:{entry.name}-2}}}}"
            )
    return found


def finetune_config(job: FinetuneConfig, entry: BaseEntry, *, without: Sequence[str] = ()) -> FinetuneConfig:
    """Returns the fine-tuning of an entry: the keys of the job, with those of the entry over them.

    Args:
        job: The stack or the sweep that it is part of.
        entry: Its keys are full, or short as in a search space.
        without: Keys of the entry that say something else.

    Raises:
        ConfigError: an unknown key, a value that it doesn't take, or a key of the data, which all base models share.
    """
    keys = flatten({key: value for key, value in entry.params.items() if key not in without})
    try:
        _check_no_data(keys)
        return trial_config(job, keys)
    except ConfigError as error:  # which calls a key by its place in a search space
        raise ConfigError(re.sub(r"\bspace\.", f"base model {entry.name}: ", str(error), count=1)) from error


def _check_no_data(keys: Iterable[str]) -> None:
    for key in keys:
        if (full := full_key(key)).startswith("data."):
            raise ConfigError(
                f"space.{key}: all base models learn from the same data; give {full}=... to the stack itself"
            )


def with_places(entries: Sequence[Any], located: Callable[[str], str]) -> list[Any]:
    """Returns the entries of a level, as the user wrote them, with other words for runs and for weights of backbones.

    Args:
        entries: They have a known form.
        located: Given ``run:RUN``, or what a key backbone.weights says.
    """
    return [_placed(entry, located) for entry in entries]


def _placed(entry: Any, located: Callable[[str], str]) -> Any:
    if isinstance(entry, str):
        return located(entry) if entry.startswith(RUN_PREFIX) else entry
    ((kind, params),) = entry.items()
    if kind.startswith(RUN_PREFIX):
        return {located(kind): params}
    return {kind: _with_weights(params, located)} if kind in (FINETUNE, PROBE) and params else entry


def _with_weights(params: Mapping[str, Any], located: Callable[[str], str], section: str = "") -> dict[str, Any]:
    found = dict(params)
    for name, value in params.items():
        key = f"{section}{name}"
        if isinstance(value, Mapping) and key not in OF_A_PROBE:
            found[name] = _with_weights(value, located, f"{key}.")
        elif isinstance(value, str) and _is_weights(key):
            found[name] = located(value)
    return found


def _is_weights(name: str) -> bool:
    try:
        return full_key(name) == "backbone.weights"
    except ConfigError:  # of the entry itself, or one that is refused where its value is used
        return False


def _escaped(kind: str) -> str:
    """Returns a kind as the key of an entry is written in an override, where a colon would end it."""
    return kind.replace(":", "\\:")


def _parsed(key: str, entry: Any) -> BaseEntry:
    if isinstance(entry, str):
        kind: Any = entry
        params: Any = {}
    elif isinstance(entry, Mapping) and len(entry) == 1:
        ((kind, params),) = entry.items()
        params = {} if params is None else params
    else:
        raise ConfigError(f"{key}={entry}: no base model; {_FORMS}")
    if not isinstance(kind, str) or not isinstance(params, Mapping):
        raise ConfigError(f"{key}={entry}: no base model; {_FORMS}")
    # A run that is given by its folder is called as that is.
    name = str(params.get("name", kind.removeprefix(RUN_PREFIX).rstrip("/").rpartition("/")[2]))
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{key}: {name!r} can't name a base model; use up to 60 letters, digits, and _ . + -, no dot in front"
        )
    if name in _TAKEN:
        raise ConfigError(f"{key}: a base model can't be called {name}, as another column is; give it another name")
    rest = {str(name): value for name, value in params.items() if name != "name"}
    if kind.startswith(RUN_PREFIX) and rest:
        raise ConfigError(f"{key}={kind}: a run is taken as it is; leave {', '.join(rest)} out")
    return BaseEntry(name, kind, rest)
