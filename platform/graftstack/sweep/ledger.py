"""The rows of the trials that are over, one small file each: what a sweep need not do again."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, get_args

from graftstack.storage import Folder
from graftstack.sweep.trials import Status, TrialResult

log = logging.getLogger(__name__)

_SUFFIX = ".json"

# What a row that was read must hold; damage that is still JSON is damage too.
_TYPES: dict[str, Any] = {
    "index": int,
    "params": dict,
    "status": str,
    "metrics": dict,
    "history": list,
    "epochs": int,
    "seconds": int | float,
    "backbone_forwards": int,
    "details": dict,
    "error": str | None,
}


class Ledger:
    """The folder `trials` of a run; ``00003.json`` is the row of trial 3."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def write(self, result: TrialResult) -> None:
        """Puts the row of a trial on disk, whole or not at all. Raises `StorageError`, `RunError`."""
        self.folder.write(_file_name(result.index), json.dumps(asdict(result)).encode())

    def find(self, index: int) -> TrialResult | None:
        """Returns the row of trial `index`; None if there is none, or none that can be read: then it runs again."""
        name = _file_name(index)
        try:
            return _parsed(self.folder.read(name), index)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s: no readable row (%s); the trial runs again", self.folder.path(name), error)
            return None

    def read(self) -> dict[int, TrialResult]:
        """Returns all rows that can be read, by the index of their trial, in its order."""
        stems = [PurePosixPath(name).stem for name in self.folder.names() if name.endswith(_SUFFIX)]
        indices = sorted(int(stem) for stem in stems if stem.isdecimal())
        found = self.folder.of_each(indices, self.find)
        return {result.index: result for result in found if result is not None}


def trial_rows(results: Iterable[TrialResult]) -> list[dict[str, Any]]:
    """Returns what ``runs show RUN --json`` says of each trial that is over."""
    return [
        {
            "trial": result.index,
            **{key: result.details[key] for key in ("freeze_depth", "lr") if key in result.details},
            **result.params,
            "status": result.status,
            "metrics": result.metrics,
            "seconds": result.seconds,
            "epochs": result.epochs,
            **({"error": result.error} if result.error else {}),
        }
        for result in results
    ]


def _file_name(index: int) -> str:
    return f"{index:05d}{_SUFFIX}"


def _parsed(data: bytes, index: int) -> TrialResult:
    """Returns the row that `data` holds. Raises `ValueError`, `TypeError` or `KeyError` if it isn't that of `index`."""
    row = json.loads(data)
    for key, kind in _TYPES.items():
        if not isinstance(row[key], kind):
            raise TypeError(f"{key}: {row[key]!r}")
    if row["status"] not in get_args(Status):
        raise ValueError(f"status: {row['status']!r}")
    if row["index"] != index:
        raise ValueError(f"the row of trial {row['index']}")
    if not all(isinstance(epoch, dict) for epoch in row["history"]):
        raise TypeError("history: not rows")
    return TrialResult(**{**row, "history": tuple(row["history"])})
