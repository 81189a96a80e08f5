"""What a submission sends along."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from graftstack.amounts import size
from graftstack.config.jobs import JOBS
from graftstack.doctor.finding import Finding, from_error
from graftstack.errors import BadInputError
from graftstack.submit.packing import MOST_BYTES, code_files, job_files, pack

Files = Mapping[str, Path | bytes]


def everything_sent() -> Files:
    """Returns what ``submit --with-code`` packs, for all jobs together: each alone is a little less."""
    files: dict[str, Path | bytes] = {}
    for job in JOBS:
        files |= job_files(job)
    return files | code_files()


def check_upload(files: Callable[[], Files], *, most_bytes: int = MOST_BYTES) -> Finding:
    """What is sent with ``--with-code`` can be read, and is no larger than a cluster's head should keep in memory."""
    try:
        found = files()
    except BadInputError as error:  # git can't say what they are, and is needed for nothing else
        return replace(from_error("upload", error), status="warn")
    try:
        package = pack(found, most_bytes=most_bytes)
    except BadInputError as error:
        return from_error("upload", error)
    num_bytes = size(package.num_bytes)
    return Finding("upload", "ok", f"--with-code sends {len(package.names)} files, {num_bytes} of {size(most_bytes)}")
