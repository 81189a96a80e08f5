"""What a check of the doctor returns."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do about it."""

    name: str
    status: Status
    """ok; warn: jobs run, but slower or otherwise than expected; broken: some jobs can't run."""
    detail: str
    fix: str = ""
    """One line, a command where there is one; empty when all is well."""


def gib(num_bytes: float) -> str:
    """Returns a number of bytes in GiB, as a finding shows it."""
    return f"{num_bytes / 1024**3:.1f} GiB"
