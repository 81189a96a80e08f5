"""What a check of the doctor returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "broken"]

Say = Callable[[str], None]
"""Takes a line for whoever waits."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do about it."""

    name: str
    status: Status
    """ok; warn: jobs run, but slower or otherwise than expected; broken: some jobs can't run."""
    detail: str
    fix: str = ""
    """One line, a command where there is one; empty when all is well."""


def examine(name: str, check: Callable[[], Finding]) -> Finding:
    """Runs a check, whose finding has that name; one that fails is a finding too, and hides no other."""
    try:
        return check()
    except Exception as error:
        return not_checked(name, error)


def not_checked(name: str, error: Exception) -> Finding:
    """Returns what is said of a check that failed."""
    return Finding(name, "broken", f"can't be checked: {type(error).__name__}: {error}", "mend that first")


def from_error(name: str, error: Exception) -> Finding:
    """Returns what one of our own errors says: one line, whose last part is the remedy."""
    detail, _, fix = str(error).rpartition("; ")
    return Finding(name, "broken", detail or fix, fix if detail else "mend that first")


def gib(num_bytes: float) -> str:
    """Returns a number of bytes in GiB, as a finding shows it."""
    return f"{num_bytes / 1024**3:.1f} GiB"
