"""Files at an fsspec URI, as `storage.Folder` needs them: whole or not there, and errors that say what to do."""

import logging
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from graftstack.file_systems import Opened, opened, reaching
from graftstack.reason import reason

log = logging.getLogger(__name__)

# Others write too, so what was listed before isn't what is there.
_OPTIONS = {protocol: {"use_listings_cache": False} for protocol in ("s3", "s3a", "gs", "gcs")}

# What stores that speak S3 answer to a put on the condition that there is no such object: there is one, or it isn't
# known there how to look.
_TAKEN = {"PreconditionFailed", "412"}
_UNCONDITIONAL = {"NotImplemented", "501"}


class ArrowPlace(NamedTuple):
    """A folder for a library that goes by Arrow's file systems."""

    filesystem: Any
    """A `pyarrow.fs.FileSystem`; None: the path says it all."""
    path: str
    """In the words of `filesystem`."""


class RemoteFiles:
    """The files below a URI. Every method raises `StorageUnreachableError` where the file system can't be asked."""

    def __init__(self, location: str) -> None:
        """Reaches nothing yet. Raises `StorageUnreachableError` where nothing here knows this kind of URI."""
        self._location = location
        self._fs, self._root = opened(location, **_OPTIONS.get(location.partition("://")[0], {}))

    def read(self, name: str) -> bytes:
        """Returns the content of a file. Raises `FileNotFoundError`."""
        with self._reaching():
            return Opened(self._fs, self._path(name)).read()

    def put(self, name: str, data: bytes) -> None:
        """Makes or replaces a file; readers see it once it is whole."""
        with self._reaching():
            self._fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, source: Path) -> None:
        """Does so with the content of a local file."""
        with self._reaching():
            self._fs.put_file(str(source), self._path(name))

    def put_new(self, name: str, data: bytes) -> bool:
        """Makes a file and returns True, or returns False if there is one; of several that try, one makes it.

        A store that can't put on that condition is asked first, and then two that try at once may both succeed.
        """
        with self._reaching():
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except (OSError, NotImplementedError, TypeError, ValueError) as error:
                if isinstance(error, FileExistsError) or _code(error) in _TAKEN:
                    # If the answer to a first attempt got lost, it is its own file that a second one meets.
                    with suppress(FileNotFoundError):  # whoever made it may have removed it again
                        return self.read(name) == data
                    return False
                if isinstance(error, OSError) and _code(error) not in _UNCONDITIONAL:
                    raise
                log.debug("%s: puts on no condition (%s)", self._location, reason(error))
                if self._fs.exists(self._path(name)):
                    return False
                self._fs.pipe_file(self._path(name), data)
        return True

    def exists(self, name: str) -> bool:
        """Returns whether the file or folder `name` is there, or, for an empty name, the folder itself."""
        with self._reaching():
            return bool(self._fs.exists(self._path(name)))

    def names(self) -> list[str]:
        """Returns the names of files and folders here; none if there is no such folder."""
        folder = self._path("").rstrip("/")
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError), self._reaching():
            found = (path.rstrip("/") for path in self._fs.ls(folder, detail=False))
            # Some tools put an empty object where a folder begins.
            return [PurePosixPath(path).name for path in found if path != folder]
        return []

    def remove(self, name: str) -> None:
        """Removes the file `name` if it is there."""
        with suppress(FileNotFoundError), self._reaching():
            self._fs.rm_file(self._path(name))

    def remove_all(self) -> None:
        """Removes everything here."""
        with suppress(FileNotFoundError), self._reaching():
            if files := self._fs.find(self._path("")):
                self._fs.rm(files)

    def sweep(self, older_than_s: float) -> None:
        """Ends uploads in parts that were begun here, at least so long ago, and never finished: they cost their room.

        Other stores than S3 know none, and some keep them to themselves.
        """
        if not hasattr(self._fs, "call_s3"):
            return
        bucket, prefix, _ = self._fs.split_path(f"{self._path('').rstrip('/')}/")
        try:
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
            for upload in found:
                age_s = (datetime.now(UTC) - upload["Initiated"]).total_seconds()
                if upload["Key"].startswith(prefix) and age_s >= older_than_s:
                    which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._fs.call_s3("abort_multipart_upload", Bucket=bucket, **which)
        except Exception as error:  # tidying up fails for many reasons, and no run should for it
            log.debug("%s: doesn't say what uploads are unfinished (%s)", self._location, reason(error))

    def for_arrow(self) -> ArrowPlace:
        """Returns the folder as Arrow takes it; reaches nothing."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return ArrowPlace(PyFileSystem(FSSpecHandler(self._fs)), self._path(""))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _reaching(self) -> AbstractContextManager[None]:
        return reaching(self._location)


def _code(error: BaseException) -> str:
    """Returns what an S3 server called an error; empty if it is none of its own."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
