"""Fitted models as bytes that run no code of their own when they are read."""

import builtins
import importlib
from collections.abc import Collection
from typing import Any

import numpy as np

_TRUSTED = ("sklearn", "numpy", "scipy", "lightgbm", "xgboost", "graftstack", "collections", "builtins")
"""Packages whose types may be made when a model is read."""

# Of what these packages offer, functions too: they are for models to hold, and touch nothing outside.
_TRUSTED_FUNCTIONS = ("sklearn", "graftstack")

# It holds a function and arguments, which are looked at by themselves.
_PARTIAL = "functools.partial"


class UnstorableError(Exception):
    """A model that can't be written, or was written by someone else; says why."""


def model_bytes(model: Any, *, trusting: Collection[str] = ()) -> bytes:
    """Returns what `model_of` makes the same model of.

    Raises:
        UnstorableError: skops can't take the model, or it holds a type that `model_of` wouldn't make.
    """
    from skops import io

    try:
        data: bytes = io.dumps(model)
    except Exception as error:  # skops raises what it meets
        raise UnstorableError(f"skops can't store {type(model).__name__}: {error}") from error
    _trusted(data, trusting)
    return data


def model_of(data: bytes, *, trusting: Collection[str] = ()) -> Any:
    """Returns the model that `data` holds.

    Args:
        data: From `model_bytes`.
        trusting: Types that may be made beside those of trusted packages, e.g. ``mine.Encoder``.

    Raises:
        UnstorableError: it holds other types, or isn't a model.
    """
    from skops import io

    trusted = _trusted(data, trusting)
    try:
        return io.loads(data, trusted=trusted)
    except Exception as error:  # other versions of a package may fail in any way
        raise UnstorableError(f"can't be read: {error}") from error


def _trusted(data: bytes, trusting: Collection[str]) -> list[str]:
    """Returns the types in `data` beyond those that skops knows. Raises `UnstorableError` at one that isn't trusted."""
    from skops import io

    try:
        types: list[str] = io.get_untrusted_types(data=data)
    except Exception as error:  # anything may be wrong with damaged data
        raise UnstorableError(f"can't be read: {error}") from error
    others = [name for name in types if name not in trusting and not _is_trusted(name)]
    if others:
        raise UnstorableError(f"it holds {', '.join(others)}, which isn't of {', '.join(_TRUSTED)}")
    return types


def _is_trusted(name: str) -> bool:
    root, _, rest = name.partition(".")
    if name == _PARTIAL:
        return True
    if root not in _TRUSTED or not rest:
        return False
    if root == "builtins":
        return isinstance(getattr(builtins, rest, None), type)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return False
    return isinstance(found, type | np.ufunc) or (callable(found) and root in _TRUSTED_FUNCTIONS)
