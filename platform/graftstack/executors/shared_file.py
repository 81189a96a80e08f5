"""A value in a file that any number of processes read in place: its pickle, and beside it the arrays that it holds."""

import mmap
import os
import pickle
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

_ALIGNMENT = 64
"""Of arrays, in bytes: that of a cache line, which vector instructions want."""


def new_folder() -> Path:
    """Returns a new folder for what is shared; removes those that processes which were killed have left."""
    prefix = f"graftstack-{platform.node()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid = re.fullmatch(r"(\d+)-.*", folder.name.removeprefix(prefix))
        if pid and not _is_running(int(pid[1])):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def write_shared(value: Any, path: Path) -> None:
    """Writes `value`, of which arrays aren't copied on the way. Raises whatever pickling raises."""
    import cloudpickle

    arrays: list[pickle.PickleBuffer] = []
    pickled = cloudpickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(pickled), *(array.raw() for array in arrays)]
    header = pickle.dumps([part.nbytes for part in parts])
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.seek(_aligned(file.tell()))
            file.write(part)
        file.truncate(_aligned(file.tell()) + _ALIGNMENT)  # so that even an empty array has a place


def read_shared(path: Path) -> Any:
    """Returns what was written, with arrays that lie in the file and can't be written to.

    The file may be removed meanwhile. Raises whatever unpickling raises.
    """
    with path.open("rb") as file:
        held = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    end = 8 + int.from_bytes(held[:8], "little")
    parts = []
    for size in pickle.loads(held[8:end]):  # noqa: S301 - of this machine's own making
        begin = _aligned(end)
        end = begin + size
        parts.append(held[begin:end])
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
