"""Keys that say what a task's result depends on: where they are equal, one result stands for the other.

What draws at random without a seed, `random_state=None`, gives another result each time; any of them will do.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from graftstack.data.splits import Rows
from graftstack.stacking.work import BaseModel, RowSource


class UnkeyableError(Exception):
    """A value that can't be told from others from one process to the next; says which."""


def base_key(base: BaseModel, *, view: str, y: str, seed: int) -> str:
    """Returns what all tasks of a base share: everything but its name and the rows.

    Args:
        base: Its estimator with all parameters, method and fit parameters count. An estimator may have a method
            `key_params` that returns those of its parameters on which results depend, and an attribute `key_packages`
            that names packages, beside its own and scikit-learn's, whose versions count.
        view: The fingerprint of what it learns from.
        y: The fingerprint of what it predicts.
        seed: Of the stack.

    Raises:
        UnkeyableError: a parameter can't be described.
    """
    parts_of_it = list(_estimators_in(base.estimator))
    own = (type(part).__module__.partition(".")[0] for part in parts_of_it)
    named = {"scipy", *(package for part in parts_of_it for package in getattr(part, "key_packages", ()))}
    for package in named:
        import_module(package)  # its version counts, whether or not somebody has loaded it before
    packages = sorted({"sklearn", "numpy", *own, *named})
    versions = [f"{package} {getattr(sys.modules.get(package), '__version__', '')}" for package in packages]
    parts = [fingerprint(base.estimator), base.method, fingerprint(dict(base.fit_params)), view, y, str(seed)]
    return _digest(*parts, *versions)


def task_key(base: str, *, train: Rows | None, test: Rows | None, keeps_model: bool) -> str:
    """Returns the key of one task.

    Args:
        base: From `base_key`.
        train: The rows that it learns from; None: all.
        test: The rows that it predicts; None: none, it is a refit.
        keeps_model: Whether its model is part of the result.
    """
    return _digest(base, fingerprint(train), fingerprint(test), str(keeps_model))


def fingerprint(value: Any) -> str:
    """Returns a digest of what `value` holds, which is the same in all processes.

    Values that have a text `fingerprint` themselves are asked for it.

    Raises:
        UnkeyableError: `value` can't be described.
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in _described(value):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def types_of(estimator: Any) -> set[str]:
    """Returns the types of an estimator and of those in its parameters, e.g. ``sklearn.svm._classes.SVC``."""
    return {_type_name(part) for part in _estimators_in(estimator)}


def _estimators_in(value: Any) -> Iterator[Any]:
    """Yields the estimators that `value` is, or holds in its parameters."""
    if isinstance(value, list | tuple):
        held = list(value)
    elif _is_estimator(value):
        yield value
        held = list(value.get_params(deep=False).values())
    else:
        return
    for item in held:
        yield from _estimators_in(item)


def _described(value: Any) -> Iterator[bytes]:
    """Yields texts that tell `value` from any other, part by part."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        yield f"{_type_name(value)} {value!r}".encode()
    elif isinstance(value, list | tuple):
        yield f"{_type_name(value)} {len(value)}".encode()
        for item in value:
            yield from _described(item)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from _described(key)
            yield from _described(value[key])
    elif isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield _function(value).encode()
    elif isinstance(value, RowSource):
        yield f"{_type_name(value)} {value.fingerprint}".encode()
    elif _is_estimator(value):
        yield _type_name(value).encode()
        yield from _described(value.key_params() if hasattr(value, "key_params") else value.get_params(deep=False))
    else:
        yield from _described_data(value)


def _described_data(value: Any) -> Iterator[bytes]:
    """Yields texts for tables, sparse matrices, and whatever joblib can hash."""
    import joblib
    from scipy import sparse

    if sparse.issparse(value):
        # Other attributes say what was found out about the same values since.
        parts = ("data", "indices", "indptr") if value.format in {"csr", "csc", "bsr"} else ("row", "col", "data")
        held = value if value.format in {"csr", "csc", "bsr"} else value.tocoo()
        yield f"{_type_name(value)} {value.shape}".encode()
        for part in parts:
            yield joblib.hash(getattr(held, part)).encode()
    elif hasattr(value, "iloc"):
        yield from _described_frame(value)
    else:
        try:
            yield joblib.hash(value).encode()
        except Exception as error:  # pickling raises what it meets
            raise UnkeyableError(f"{_type_name(value)} can't be hashed: {error}") from error


def _described_frame(frame: Any) -> Iterator[bytes]:
    """Yields texts for a DataFrame or a Series: what it holds, however its blocks lie in memory."""
    import joblib
    import pandas as pd

    columns = [frame.iloc[:, place] for place in range(frame.shape[1])] if frame.ndim == 2 else [frame]
    yield f"{_type_name(frame)} {frame.shape}".encode()
    for column in columns:
        categories = list(column.cat.categories) if isinstance(column.dtype, pd.CategoricalDtype) else []
        yield f"{column.name!r} {column.dtype!s} {categories!r}".encode()
        try:
            yield joblib.hash(pd.util.hash_pandas_object(column, index=False).to_numpy()).encode()
        except TypeError as error:
            raise UnkeyableError(f"column {column.name!r} can't be hashed: {error}") from error
        if column.dtype == object:  # where 1 and "1" have the same hash
            types = np.array([_type_name(cell) for cell in column], dtype=str)
            yield joblib.hash(np.unique(types, return_inverse=True)).encode()


def _function(value: Any) -> str:
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in value.__qualname__:
        raise UnkeyableError(f"{name} has no name that another process could find; define it at the top of a module")
    return name


def _is_estimator(value: Any) -> bool:
    return hasattr(value, "get_params") and not isinstance(value, type)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()
