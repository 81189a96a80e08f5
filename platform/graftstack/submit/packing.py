"""The files that go along with a job, as one archive: the same bytes for the same files."""

import io
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from graftstack.amounts import size
from graftstack.config.paths import conf_dir, jobs_dir
from graftstack.errors import BadInputError
from graftstack.reason import reason

MOST_BYTES = 100 * 1024**2
"""Files of more than this together aren't sent: a cluster keeps the archive in memory, on its head."""

# The oldest time that an archive can hold, for all files: when they were written says nothing.
_WRITTEN = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16
_DIRECTORY_OF_PACKAGE = "graftstack"

_NUM_SHOWN = 5


class Package(NamedTuple):
    """An archive of files."""

    content: bytes
    """A zip file."""
    names: list[str]
    """Of the files, as they lie below the working folder of the job."""
    num_bytes: int
    """Of all files, unpacked."""


def pack(files: Mapping[str, Path | bytes], *, most_bytes: int = MOST_BYTES) -> Package:
    """Returns an archive of files, given by their names in it.

    Raises:
        BadInputError: they are larger than `most_bytes` together, which names the largest, or one can't be read.
    """
    sizes = {name: _size(file) for name, file in files.items()}
    if (num_bytes := sum(sizes.values())) > most_bytes:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_NUM_SHOWN]
        shown = ", ".join(f"{name} ({size(sizes[name])})" for name in largest)
        raise BadInputError(
            f"{size(num_bytes)} to send, more than {size(most_bytes)}: the largest files are {shown}; add them to "
            ".gitignore, or put them where the cluster reads them"
        )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _WRITTEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = _MODE
            out.writestr(entry, _content(files[name]))
    return Package(archive.getvalue(), sorted(files), num_bytes)


def job_files(job: str) -> dict[str, Path]:
    """Returns the script of a job, which runs the graftstack that the cluster has."""
    return {f"jobs/{job}.py": jobs_dir() / f"{job}.py"}


def code_files() -> dict[str, Path]:
    """Returns this graftstack itself, laid out as a wheel installs it, so that the cluster needs none of its own.

    Of a working tree it is what git doesn't ignore.

    Raises:
        BadInputError: git can't say what that is.
    """
    package, conf, jobs = Path(__file__).resolve().parents[1], conf_dir(), jobs_dir()
    if conf.is_relative_to(package):  # installed from a wheel
        files = [file for file in package.rglob("*") if "__pycache__" not in file.parts]
    else:
        files = [file for folder in (package, conf, jobs) for file in unignored(folder)]
    found = {}
    for file in filter(Path.is_file, files):
        if file.is_relative_to(package):
            found[f"{_DIRECTORY_OF_PACKAGE}/{file.relative_to(package).as_posix()}"] = file
        else:
            found[f"{_DIRECTORY_OF_PACKAGE}/_bundled/{file.relative_to(conf.parent).as_posix()}"] = file
    return found


def unignored(folder: Path) -> list[Path]:
    """Returns the files below a folder of a working tree that git has or would add, changed or not.

    Raises:
        BadInputError: it is no working tree of git's, or git isn't there.
    """
    words = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(words, capture_output=True, check=True).stdout  # noqa: S603 - a fixed command
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", b"") or str(error).encode()
        raise BadInputError(
            f"--with-code: git can't list {folder} ({_first_line(why)}); install git, or leave --with-code out and "
            "install graftstack on the cluster"
        ) from error
    # A name is bytes, and needn't be text; one that was removed since it was added is still listed.
    names = sorted({name.decode(errors="surrogateescape") for name in listed.split(b"\0") if name})
    return [file for name in names if (file := folder / name).is_file()]


def _first_line(message: bytes) -> str:
    return reason(RuntimeError(message.decode(errors="replace")))


def _size(file: Path | bytes) -> int:
    if isinstance(file, bytes):
        return len(file)
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _content(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> BadInputError:
    return BadInputError(f"{file}: can't be read ({error.strerror}); mend that, or add it to .gitignore")
