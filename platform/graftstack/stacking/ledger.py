"""What is finished, on disk: a start after a kill reads it instead of computing it again."""

import hashlib
import io
import json
import logging
from typing import Any, NamedTuple

import numpy as np

from graftstack.errors import GraftstackError, StorageUnreachableError
from graftstack.stacking.ledger_keys import types_of
from graftstack.stacking.model_file import UnstorableError, model_bytes, model_of
from graftstack.stacking.work import FoldResult, RefitResult
from graftstack.storage import Folder

log = logging.getLogger(__name__)

Result = FoldResult | RefitResult


class _Part(NamedTuple):
    """The model of an entry: the names of its files, and how they are read."""

    how: str
    """none, skops, or own: by the estimator's `load_from`."""
    files: dict[str, str]
    """Name in the ledger's folder -> digest."""


class Ledger:
    """A folder of finished tasks under keys of `ledger_keys`; it pickles as its location.

    ``KEY.json`` is written last and holds the digests of ``KEY.npz`` (predictions) and of the model: ``KEY.skops``, or
    the folder ``KEY.model`` of an estimator that has `save_to` and `load_from`. So an entry is whole or doesn't count.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def exists(self, key: str) -> bool:
        """Returns whether there is an entry, be it damaged."""
        return self.folder.exists(_header(key))

    def find(self, key: str, estimator: Any) -> Result | None:
        """Returns the result under `key`; None if there is none, or it can't be read: then it is made again.

        Args:
            key: Of the task.
            estimator: What the task fits: its types, and those in its parameters, are trusted in the stored model.

        Raises:
            StorageUnreachableError: whether there is one can't be known.
        """
        try:
            header = json.loads(self.folder.read(_header(key)))
            return self._result(key, header, estimator)
        except StorageUnreachableError:
            raise
        except FileNotFoundError:
            if self.exists(key):
                log.warning("%s: its files are missing; the task runs again", self.folder.path(key))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, GraftstackError, UnstorableError) as error:
            log.warning("%s: can't be read (%s); the task runs again", self.folder.path(key), error)
        return None

    def write(self, key: str, result: Result, estimator: Any) -> str | None:
        """Stores a result, whole or not at all; returns why not, where it is of a kind that can't be stored.

        Raises:
            StorageFullError, RunError: the folder can't be written.
        """
        header: dict[str, Any] = {"kind": type(result).__name__, "fit_s": result.fit_s}
        try:
            arrays = b"" if isinstance(result, RefitResult) else _array_bytes(result.predictions)
            model = self._write_model(key, result.model, estimator)
        except UnstorableError as error:
            return str(error)
        files = dict(model.files)
        if isinstance(result, FoldResult):
            header["predict_s"] = result.predict_s
            self.folder.write(f"{key}.npz", arrays)
            files[f"{key}.npz"] = _digest(arrays)
        header |= {"model": model.how, "files": files}
        header["digest"] = _digest_of(header)
        self.folder.write(_header(key), json.dumps(header).encode())
        return None

    def _write_model(self, key: str, model: Any, estimator: Any) -> _Part:
        if model is None:
            return _Part("none", {})
        if hasattr(model, "save_to"):
            folder = self.folder / _own(key)
            model.save_to(folder)
            return _Part("own", {f"{folder.name}/{name}": _digest(folder.read(name)) for name in folder.names()})
        data = model_bytes(model, trusting=types_of(estimator))
        self.folder.write(f"{key}.skops", data)
        return _Part("skops", {f"{key}.skops": _digest(data)})

    def _result(self, key: str, header: dict[str, Any], estimator: Any) -> Result:
        """Returns what an entry says. Raises many errors if it is damaged."""
        if header.pop("digest") != _digest_of(header):
            raise ValueError("its digest is another")
        for name, digest in header["files"].items():
            if _digest(self.folder.read(name)) != digest:
                raise ValueError(f"{name} is damaged")
        model = self._model(key, header["model"], estimator)
        if header["kind"] == RefitResult.__name__:
            return RefitResult(model, header["fit_s"])
        predictions = _arrays(self.folder.read(f"{key}.npz"))
        return FoldResult(predictions, header["fit_s"], header["predict_s"], model)

    def _model(self, key: str, how: str, estimator: Any) -> Any:
        if how == "none":
            return None
        if how == "own":
            return type(estimator).load_from(self.folder / _own(key))
        return model_of(self.folder.read(f"{key}.skops"), trusting=types_of(estimator))


def _header(key: str) -> str:
    return f"{key}.json"


def _own(key: str) -> str:
    return f"{key}.model"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(header: dict[str, Any]) -> str:
    return _digest(json.dumps(header, sort_keys=True).encode())


def _array_bytes(predictions: Any) -> bytes:
    """Returns an array, or a list of arrays, exactly. Raises `UnstorableError` for anything else."""
    parts = predictions if isinstance(predictions, list) else [predictions]
    if not all(isinstance(part, np.ndarray) and not part.dtype.hasobject for part in parts):
        raise UnstorableError("its predictions aren't arrays of numbers or text")
    names = [f"output{place}" for place in range(len(parts))] if isinstance(predictions, list) else ["predictions"]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(zip(names, parts, strict=True)))
    return buffer.getvalue()


def _arrays(data: bytes) -> Any:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if arrays.files == ["predictions"]:
            return arrays["predictions"]
        return [arrays[f"output{place}"] for place in range(len(arrays.files))]
