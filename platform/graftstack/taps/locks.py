"""Locks between the processes of a machine; the kernel lets go of them when a process dies, however it does.

A lock is a file in the folder that it guards, and may be removed with it: whoever then holds a file that has lost its
name has no lock, notices and tries again.
"""

import errno
import fcntl
import os
from pathlib import Path

_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class FileLock:
    """A lock that is held until `close`, or until the object is gone."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Lets go; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def lock_shared(path: Path) -> FileLock:
    """Waits until nobody holds the lock alone, and shares it. Where nothing can be written, nobody needs a lock."""
    try:
        return _lock(path, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno in _READ_ONLY:
            return FileLock(None)
        raise


def lock_alone(path: Path) -> FileLock:
    """Waits until nobody else holds the lock, and takes it. A process that holds it already waits for itself."""
    return _lock(path, fcntl.LOCK_EX)


def lock_at_once(path: Path) -> FileLock | None:
    """Takes the lock alone if nobody holds it and it can be written; else returns None."""
    try:
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, *_READ_ONLY}:
            return None
        raise


def _lock(path: Path, operation: int) -> FileLock:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed in between
        lock = FileLock(descriptor)
        fcntl.flock(descriptor, operation)
        if _is_still_there(path, descriptor):
            return lock
        lock.close()


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
