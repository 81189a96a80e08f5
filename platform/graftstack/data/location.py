"""Where data lies: a local path or an fsspec URI, behind one file system."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from graftstack.errors import DataError, StorageUnreachableError
from graftstack.file_systems import Opened, opened
from graftstack.reason import reason
from graftstack.storage import is_uri

# What tells one version of a file from the next, in the words of the file systems, most telling first.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


@dataclass(frozen=True)
class Location:
    """A file or folder that exists."""

    fs: Any
    """The `fsspec` file system."""
    path: str
    """The file or folder in the words of `fs`, without protocol."""
    folder: str
    """`path` itself, or the folder that holds the file: what relative paths start from."""
    is_file: bool

    def find(self, suffixes: frozenset[str]) -> dict[str, Mapping[str, Any]]:
        """Returns relative path -> info of the files below `folder` with one of `suffixes`, sorted; none is hidden."""
        try:
            self.fs.invalidate_cache()  # what was listed for an earlier job isn't what is there
            found = self.fs.find(self.folder, detail=True)
        except Exception as error:
            raise DataError(
                f"data.path={self.path}: can't be listed: {reason(error)}; check the access rights"
            ) from error
        relative = {self.relative(path): info for path, info in found.items()}
        return {path: relative[path] for path in sorted(relative) if _suffix(path) in suffixes and not _is_hidden(path)}

    def relative(self, path: str) -> str:
        """Returns `path`, in the words of `fs`, relative to `folder`."""
        return path.removeprefix(self.folder).lstrip("/")

    def full(self, path: str) -> str:
        """Returns where a `path` of the data lies: relative to `folder`, unless it is absolute."""
        return path if path.startswith("/") else f"{self.folder.rstrip('/')}/{path}"

    def read(self, path: str) -> bytes:
        """Returns the content of a file: a path relative to `folder`, an absolute path or a URI."""
        return self._opened(path).read()

    def versions(self, paths: list[str]) -> list[str]:
        """Returns what `version` says of each path; a missing file is `missing`, for whoever decodes it to report."""

        def look(path: str) -> str:
            if not path:
                return "missing"
            try:
                fs, name = self._opened(path)
                return version(fs.info(name))
            except OSError:
                return "missing"

        with ThreadPoolExecutor(16) as pool:  # remote file systems answer slowly, but many questions at once
            return list(pool.map(look, paths))

    def _opened(self, path: str) -> Opened:
        return opened(path) if is_uri(path) else Opened(self.fs, self.full(path))


def locate(path: str) -> Location:
    """Returns the location of `path`, a local path or an fsspec URI.

    Raises:
        DataError: nothing lies there, or the file system can't be reached.
    """
    try:
        fs, name = opened(path)
        is_file = fs.isfile(name)
        exists = is_file or fs.exists(name)
    except StorageUnreachableError as error:
        raise DataError(f"data.path={error}") from error
    except Exception as error:  # each file system has exceptions of its own
        raise DataError(
            f"data.path={path}: can't be reached: {reason(error)}; check the protocol and the access"
        ) from error
    if not exists:
        raise DataError(f"data.path={path}: no such file or folder; check the spelling, or give an absolute path")
    return Location(fs=fs, path=name, folder=name.rpartition("/")[0] if is_file else name.rstrip("/"), is_file=is_file)


def version(info: Mapping[str, Any]) -> str:
    """Returns the size of a file and what its file system knows of its version: an ETag or a modification time."""
    known = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
    return f"{info.get('size')}:{known}"


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
