"""Which process owns a run: it alone may change the manifest, which names it.

An owner that says nothing for long enough is taken for gone. Then the run is anybody's, and of several that want it one
gets it: `claim`.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftstack.errors import RunError
from graftstack.storage import Folder

# A process on another host counts as gone when its last sign of life is older than this.
_SILENCE_S = 60.0

# The file with which a resumption is claimed, followed by its number.
_CLAIM = ".resumption-"

_TYPES = {"host": str, "pid": int, "beat": int | float, "resumption": int}


def this_process(*, resumption: int) -> dict[str, Any]:
    """Returns what the manifest says of this process as the owner.

    Args:
        resumption: How often the run was resumed, this time included.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _birth(os.getpid()),
        "beat": time.time(),
        "resumption": resumption,
    }


def check_process(process: Mapping[str, Any]) -> None:
    """Raises `TypeError` or `KeyError` where that is not what a file holds."""
    for key, kind in _TYPES.items():
        value = process.get(key, 0) if key == "resumption" else process[key]
        if not isinstance(value, kind):
            raise TypeError(f"{key}: {value!r}")


def is_gone(process: Mapping[str, Any]) -> bool:
    """Returns whether an owner has ended, as far as can be known here; nothing is an owner that has."""
    if process.get("host") != socket.gethostname():
        return time.time() - float(process.get("beat", 0.0)) > _SILENCE_S
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return process.get("born") != _birth(process["pid"])


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether it is one owner that was heard of, be it at different moments."""
    return {**one, "beat": None} == {**other, "beat": None}


def in_use(name: str, owner: Mapping[str, Any]) -> RunError:
    """Returns what is told to whoever wants a run that has an owner."""
    return RunError(f"name={name}: process {owner['pid']} on {owner['host']} works on it; wait for it, or stop it")


def claim(folder: Folder, name: str, number: int) -> int:
    """Claims a resumption of a run for this process: of several that try, one succeeds.

    It holds until the manifest names an owner of that number, of which whoever claims it later has to make sure. A
    process that ended before it got so far leaves its claim, and the next number is to be had.

    Args:
        folder: Of the run.
        name: Of the run.
        number: Of the resumption.

    Returns:
        `number`, or the first one after it that no living process claims.

    Raises:
        RunError: another process has it, or nothing can be written.
    """
    while True:
        # An attempt at a store is repeated where its answer is lost, and knows its own file by the content.
        content = {**this_process(resumption=number), "claim": uuid.uuid4().hex}
        try:
            folder.claim(f"{_CLAIM}{number}", json.dumps(content).encode())
        except RunError:
            other = _claimant(folder, number)
            if other is None:
                raise
            if not is_gone(other):
                raise in_use(name, other) from None
            number += 1
        else:
            return number


def release(folder: Folder, number: int) -> None:
    """Removes the claim of a resumption, if there is one."""
    folder.remove(f"{_CLAIM}{number}")


def _claimant(folder: Folder, number: int) -> dict[str, Any] | None:
    """Returns the process that claims a resumption: None if none does, and nothing of it where that is unreadable."""
    try:
        process: dict[str, Any] = json.loads(folder.read(f"{_CLAIM}{number}"))
        check_process(process)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    return process


def _birth(pid: int) -> str | None:
    """Returns when a process began, in clock ticks since boot, so that a pid used again isn't mistaken for it."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None
