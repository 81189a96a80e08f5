"""The explanation of every key, read from the docstrings under the fields of the configuration."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

from graftstack.config.plain import typed


class KeyDoc(NamedTuple):
    """One configuration key: its name, its default as it would be typed, and what it means."""

    key: str
    default: str
    text: str


def key_docs(config_type: type) -> Iterator[KeyDoc]:
    """Yields every key of a configuration dataclass, sections expanded, in the order of definition."""
    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(config_type)
    }
    yield from _docs(config_type, "", defaults)


def _docs(config_type: type, prefix: str, defaults: Mapping[str, Any]) -> Iterator[KeyDoc]:
    texts = _field_texts(config_type)
    for item in fields(config_type):
        default = defaults[item.name]
        if isinstance(item.type, type) and is_dataclass(item.type):
            # A section's defaults are those of the configuration it is in, not those of its own type.
            yield from _docs(item.type, f"{prefix}{item.name}.", vars(default))
        else:
            yield KeyDoc(f"{prefix}{item.name}", typed(default), texts[item.name])


@cache
def _field_texts(config_type: type) -> dict[str, str]:
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                assert isinstance(following.value, ast.Constant)
                texts[statement.target.id] = str(following.value.value)
    return texts
