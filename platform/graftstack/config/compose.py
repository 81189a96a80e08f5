"""YAML and overrides become one typed, validated dataclass; this module alone knows Hydra and OmegaConf."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graftstack.config.jobs import JOBS
from graftstack.config.paths import conf_dir
from graftstack.config.plain import flatten, key_types
from graftstack.config.schema import JobConfig
from graftstack.errors import ConfigError, did_you_mean

# `group=NAME` picks conf/group/NAME.yaml; where there is no such file, these groups take it as a value of that key.
_SHORT_FOR = {"backbone": "backbone.name"}

# Text that is one quoted string arrives without its quotes, as in Hydra: `name="null"` is a name.
_IN_QUOTES = re.compile(r"""\A(['"])((?:(?!\1).)*)\1\Z""", flags=re.DOTALL)

# The section whose keys are the user's own: those of the search space of a sweep.
_SPACE = "space"

# What is no text in a search space: null, a truth value or a number.
_SCALAR = re.compile(r"null|true|false|[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", flags=re.IGNORECASE)


def compose_job(job: str, overrides: Sequence[str]) -> JobConfig:
    """Returns the validated configuration of `job` with the user's ``key=value`` overrides.

    Raises:
        ConfigError: an unknown key or group, a value of the wrong type or out of range; one line.
    """
    config_type = JOBS[job]
    last_wins = _last_of_each_key(overrides)
    _check_keys(config_type, last_wins)
    ConfigStore.instance().store(name=f"{job}_schema", node=_schema(config_type))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            # All of them: the order of the space, and so that of the trials, is the one in which keys first appear.
            in_space = [override for override in overrides if _is_in_space(config_type, _key_of(override))]
            others = [override for override in last_wins if override not in in_space]
            tree = compose(job, [_hydra_override(config_type, override) for override in others])
            if in_space:
                _fill_space(tree, in_space)
        config = OmegaConf.to_object(tree)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_error(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, last_wins)) from error
    assert isinstance(config, config_type)
    return config


def known_to(job: str, overrides: Sequence[str]) -> list[str]:
    """Returns those of another job's overrides whose keys `job` has too."""
    config_type = JOBS[job]
    known = {*key_types(config_type), *_groups()}
    return [override for override in overrides if (key := _key_of(override)) in known or _is_in_space(config_type, key)]


def choices(group: str) -> list[str]:
    """Returns the names of the files of a configuration group."""
    return sorted(path.relative_to(conf_dir() / group).with_suffix("").as_posix() for path in _yaml_files(group))


def _schema(config_type: type) -> DictConfig:
    """Returns the typed tree that YAML is merged into; OmegaConf makes frozen dataclasses read-only until then."""
    tree: DictConfig = OmegaConf.structured(config_type)
    _thaw(tree)
    return tree


def _thaw(tree: DictConfig) -> None:
    OmegaConf.set_readonly(tree, False)  # noqa: FBT003
    for key in tree:
        if isinstance(child := tree._get_node(key), DictConfig):  # noqa: SLF001
            _thaw(child)


def _yaml_files(group: str) -> Iterable[Path]:
    return (conf_dir() / group).rglob("*.yaml")


def _groups() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _last_of_each_key(overrides: Sequence[str]) -> list[str]:
    """A key given twice means its last value, as everywhere on a command line."""
    for override in overrides:
        if not re.fullmatch(r"[\w.]+=.*", override, flags=re.DOTALL):
            raise ConfigError(f"{override}: not an override; write key=value")
    by_key: dict[str, str] = {}
    for override in overrides:
        key = _key_of(override)
        for same in (key, _SHORT_FOR.get(key)):
            by_key.pop(same or key, None)
        by_key[key] = override
    return list(by_key.values())


def _check_keys(config_type: type[JobConfig], overrides: Sequence[str]) -> None:
    known = {*key_types(config_type), *_groups()}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in known and not _is_in_space(config_type, key):
            raise ConfigError(f"{key}={value}: unknown key; {did_you_mean(key, known)}")
        if not value:
            raise ConfigError(f"{key}=: has no value; give one, or leave the key out")
        if key in _groups() and key not in _SHORT_FOR and value not in choices(key):
            raise ConfigError(f"{key}={value}: unknown choice; {did_you_mean(value, choices(key))}")


def _hydra_override(config_type: type[JobConfig], override: str) -> str:
    """Turns a short form into the key it stands for, and quotes text, which Hydra's grammar would otherwise read."""
    key, _, value = override.partition("=")
    if key in _SHORT_FOR and value not in choices(key):
        key = _SHORT_FOR[key]
    kind = str(key_types(config_type).get(key, ""))
    if "str" in kind and not _is_literal(value, kind):
        value = quoted(_IN_QUOTES.sub(r"\2", value))
    if _parsed(override, key, value).is_sweep_override():
        raise ConfigError(f"{override}: several values; give one, or a list in brackets where the key takes a list")
    return f"{key}={value}"


def _parsed(override: str, key: str, value: str) -> Override:
    try:
        return OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise ConfigError(f"{override}: the value can't be read; close its brackets, or put it in quotes") from error


def _is_in_space(config_type: type[JobConfig], key: str) -> bool:
    return _SPACE in key_types(config_type) and key.partition(".")[0] == _SPACE


def _fill_space(tree: DictConfig, overrides: Sequence[str]) -> None:
    """Puts the user's domains over those of the YAML, under dotted keys: `optimizer` is no parent of `optimizer.lr`."""
    space = flatten(OmegaConf.to_container(tree[_SPACE]))  # type: ignore[arg-type]
    for override in overrides:
        value = _domain(override)
        _, _, key = _key_of(override).partition(".")
        if not key and not isinstance(value, Mapping):
            raise ConfigError(f"{override}: vary which key? write {_SPACE}.KEY=[VALUE,...]")
        space |= flatten({key: value} if key else value)
    tree[_SPACE] = space


def _domain(override: str) -> Any:
    """Returns the value of a key of the space: what stands in brackets or quotes as Hydra reads it, else one scalar."""
    _, _, value = override.partition("=")
    if not (value.startswith(("[", "{")) or _IN_QUOTES.match(value) or _SCALAR.fullmatch(value)):
        if "," in value and "(" not in value:
            raise ConfigError(f"{override}: several values; put them in brackets")
        value = quoted(value)
    return _parsed(override, _SPACE, value).value()


def _is_literal(value: str, kind: str) -> bool:
    """Whether a value of a text key is not text: null, a list, or a number where the key takes numbers too."""
    is_list = "list" in kind and value.startswith("[")
    is_number = "int" in kind and re.fullmatch(r"-?[0-9]+", value) is not None
    return value == "null" or is_list or is_number


def quoted(text: str) -> str:
    """Returns `text` such that OmegaConf finds no interpolation in it, and Hydra nothing but one string."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"


def _syntax_error(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
    return f"{where}not YAML ({error.problem}); correct the file"


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Makes one line of a Hydra or OmegaConf error: the file, the key, the value and what is allowed."""
    file = re.match(r"In '([^']+)'", str(error))
    where = f"conf/{file[1]}.yaml: " if file else ""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith("raised while composing config:")]
    full_key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    given = next((override for override in overrides if _key_of(override) == full_key), full_key)
    problem = re.sub(r"^In '[^']+': ", "", lines[0]).rstrip(".:") if lines else type(error).__name__
    subject = f"{given}: " if given else ""
    return f"{where}{subject}{problem[0].lower() + problem[1:]}; see --help for what the key takes"
