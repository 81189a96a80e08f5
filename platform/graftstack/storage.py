"""Folders at a local path or an fsspec URI, in which a file is either whole or not there."""

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from graftstack.errors import RunError, StorageFullError
from graftstack.remote import ArrowPlace

if TYPE_CHECKING:
    from graftstack.remote import RemoteFiles

_Name = TypeVar("_Name")
_Found = TypeVar("_Found")

_UNFINISHED = ".tmp"
_NUM_READERS = 16
# What the system says of a place without room.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG}


def is_uri(location: str) -> bool:
    """Returns whether `location` names a remote file system (``s3://bucket/runs``)."""
    return "://" in location


class Folder:
    """A folder whose files are written atomically; it pickles as its location.

    Locally a file is written beside its final name, flushed to the disk and renamed. An object store shows an object
    only once it has arrived whole; what a writer is to make for it is a local file first. At a URI every method that
    looks or writes raises `StorageUnreachableError` where the store can't be asked.
    """

    def __init__(self, location: str | Path) -> None:
        text = str(location).removeprefix("file://")
        try:
            self.location = text.rstrip("/") if is_uri(text) else str(Path(text).expanduser().absolute())
        except RuntimeError as error:
            raise RunError(f"{text}: no user of that name has a home here; give the whole path") from error

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.path(name))

    def __repr__(self) -> str:
        return f"Folder({self.location!r})"

    @property
    def name(self) -> str:
        """The last part of the location."""
        return PurePosixPath(self.location).name

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's file system."""
        return not is_uri(self.location)

    def path(self, name: str) -> str:
        """Returns the location of a file of this folder."""
        return f"{self.location}/{name}"

    def obstacle(self) -> Path | None:
        """Returns what forbids to write here: the folder or the nearest one above it that exists; None if nothing."""
        if not self.is_local:
            return None
        nearest = Path(self.location)
        while not nearest.exists():
            nearest = nearest.parent
        return None if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else nearest

    def make(self) -> None:
        """Creates the folder and its parents. Raises `RunError` where that is refused."""
        if not self.is_local:
            return
        try:
            Path(self.location).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explained(error, self.location) from error

    def write(self, name: str, data: bytes) -> None:
        """Puts `data` into the file `name`, replacing what was there. Raises `StorageFullError`, `RunError`."""
        if self.is_local:
            self.write_with(name, lambda path: _write_bytes(path, data))
        else:
            self._remote().put(name, data)

    def write_with(self, name: str, writer: Callable[[Path], Any]) -> None:
        """Lets `writer` make a local file, then puts it into place as `name`, whole or not at all."""
        if not self.is_local:
            self._upload(name, writer)
            return
        with self._beside(name) as temporary:
            writer(temporary)
            _flush(temporary)
            temporary.replace(self.path(name))
            _flush(Path(self.location))

    def claim(self, name: str, data: bytes) -> None:
        """Puts `data` into the new file `name`; of several processes that try, one succeeds. Raises `RunError`."""
        if self.is_local:
            with self._beside(name) as temporary:
                _write_bytes(temporary, data)
                _flush(temporary)
                _put_new(temporary, Path(self.path(name)))
        elif not self._remote().put_new(name, data):
            raise RunError(f"{self.path(name)}: exists already; choose another name")

    def sweep(self, *, older_than_s: float = 0.0) -> None:
        """Removes what killed writers left unfinished, here and in all folders below.

        Args:
            older_than_s: Younger files are left alone, for somebody may be writing them; 0: for the owner alone.
        """
        if not self.is_local:
            self._remote().sweep(older_than_s)
            return
        for leftover in Path(self.location).rglob(f".*{_UNFINISHED}"):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime >= older_than_s:
                    leftover.unlink()

    def read(self, name: str) -> bytes:
        """Returns the content of the file `name`. Raises `FileNotFoundError`."""
        return Path(self.path(name)).read_bytes() if self.is_local else self._remote().read(name)

    def exists(self, name: str = "") -> bool:
        """Returns whether the file or folder `name`, or the folder itself, is there."""
        if self.is_local:
            return Path(self.path(name) if name else self.location).exists()
        return self._remote().exists(name)

    def names(self) -> list[str]:
        """Returns the sorted names of what the folder holds; of a folder that isn't there, none."""
        if self.is_local:
            root = Path(self.location)
            found = [entry.name for entry in root.iterdir()] if root.is_dir() else []
        else:
            found = self._remote().names()
        return sorted(name for name in found if not name.startswith("."))

    def of_each(self, names: Sequence[_Name], look: Callable[[_Name], _Found]) -> list[_Found]:
        """Returns what `look` finds for each name; an object store answers after a while, but answers many at once."""
        if self.is_local:
            return [look(name) for name in names]
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            return list(readers.map(look, names))

    def remove(self, name: str) -> None:
        """Removes the file `name` if it is there."""
        if self.is_local:
            Path(self.path(name)).unlink(missing_ok=True)
        else:
            self._remote().remove(name)

    def remove_all(self) -> None:
        """Removes the folder and everything in it."""
        if self.is_local:
            shutil.rmtree(self.location, ignore_errors=True)
        else:
            self._remote().remove_all()

    def for_arrow(self) -> ArrowPlace:
        """Returns the folder for libraries that go by Arrow's file systems, with the access that is used here."""
        return ArrowPlace(None, self.location) if self.is_local else self._remote().for_arrow()

    @contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        """Yields where a file is to be written before it gets its name; nothing is left there after the block."""
        self.make()
        temporary = Path(self.location) / f".{name}.{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            yield temporary
        except OSError as error:
            raise _explained(error, self.path(name)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _upload(self, name: str, writer: Callable[[Path], Any]) -> None:
        """Lets `writer` fill a file without a name, of which a kill leaves nothing, then uploads it."""
        with tempfile.TemporaryFile() as file:
            path = Path(f"/dev/fd/{file.fileno()}")
            try:
                writer(path)
            except OSError as error:
                raise _explained(error, self.path(name)) from error
            file.seek(0)  # some systems share the place in it with whoever opens that path
            self._remote().put_file(name, path)

    def _remote(self) -> "RemoteFiles":
        from graftstack.remote import RemoteFiles

        return RemoteFiles(self.location)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _put_new(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, location: str) -> Exception:
    if error.errno in FULL:
        return StorageFullError(f"{location}: no space left; free some, then run again with resume=true")
    if error.errno in _REFUSED:
        return RunError(f"{location}: can't be written ({error.strerror}); choose another runs_dir")
    if error.errno == errno.EEXIST:
        return RunError(f"{location}: exists already; choose another name")
    return error
