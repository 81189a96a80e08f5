"""The `fsspec` file systems of this process, and what their faults mean to whoever named a place."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

from graftstack.errors import GraftstackError, StorageUnreachableError
from graftstack.reason import reason

# What brings a file system, by its protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

# What S3 and Google say of a bucket that isn't there, which is no mere missing file.
_NO_BUCKET = "bucket does not exist"

_systems: dict[tuple[int, str, str], Any] = {}
"""The file systems by the number of the process, as none outlives a fork, by place, and by options."""
_opening = threading.Lock()


class Opened(NamedTuple):
    """A file or folder, and what reads it."""

    fs: Any
    """The `fsspec` file system."""
    path: str
    """In the words of `fs`, without protocol."""

    def read(self) -> bytes:
        """Returns the content, with no question for its size before: that pays off for large files only."""
        content: bytes = self.fs.cat_file(self.path, **_in_one_piece(self.fs.__class__))
        return content


def opened(location: str, **options: Any) -> Opened:
    """Returns what reads a place; reaches nothing but the files that a chain leads through.

    All threads of a process share the connections to a place.

    Args:
        location: A local path, a URI, or a chain of them, as ``zip://images::/data/all.zip``.
        options: Of the file system, where it isn't to be as `fsspec` makes it.

    Raises:
        StorageUnreachableError: nothing here knows this kind of URI.
    """
    import fsspec

    try:
        if "://" not in location or "::" in location:
            return Opened(*fsspec.core.url_to_fs(location, **options))
        fs = _shared(location, options)
    except ImportError as error:
        extra = _EXTRAS.get(location.partition("://")[0])
        remedy = f"pip install 'graftstack[{extra}]'" if extra else "install its package, or use a path"
        raise StorageUnreachableError(f"{location}: can't be reached ({reason(error)}); {remedy}") from error
    except ValueError as error:
        raise StorageUnreachableError(
            f"{location}: can't be reached ({reason(error)}); install its package, or use a path"
        ) from error
    return Opened(fs, fs._strip_protocol(location))  # noqa: SLF001 - what `fsspec` itself goes by


def _shared(location: str, options: dict[str, Any]) -> Any:
    import fsspec

    protocol, _, path = location.partition("://")
    # Some protocols name a repository or an archive in the path; each is a file system of its own.
    options = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(location) | options  # noqa: SLF001
    key = os.getpid(), f"{protocol}://{path.partition('/')[0]}", repr(sorted(options.items()))
    with _opening:
        if key not in _systems:
            _systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        return _systems[key]


@contextmanager
def reaching(location: str) -> Iterator[None]:
    """Turns what a file system raises in the block into `StorageUnreachableError`; a file may be missing there."""
    try:
        yield
    except GraftstackError:
        raise
    except FileNotFoundError as error:
        if _NO_BUCKET not in str(error):
            raise
        raise StorageUnreachableError(f"{location}: there is no such bucket; make it, or choose another one") from error
    except PermissionError as error:
        raise StorageUnreachableError(
            f"{location}: access is refused ({reason(error)}); check the credentials and their rights"
        ) from error
    except Exception as error:  # each file system has exceptions of its own
        raise StorageUnreachableError(
            f"{location}: can't be reached ({reason(error)}); check the address and the access"
        ) from error


@cache
def _in_one_piece(kind: type) -> dict[str, int]:
    """Returns the option with which files of a kind of file system are read by one request."""
    read = getattr(kind, "_cat_file", None)
    return {"max_concurrency": 1} if read is not None and "max_concurrency" in signature(read).parameters else {}
