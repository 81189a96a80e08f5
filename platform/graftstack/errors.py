"""The exceptions that graftstack raises for its user.

Every message is one line that names the rule, the value and the remedy, e.g.
``freeze_depth=9: resnet18 has 6 layer groups; use 0..6 or "all"``.
"""

import difflib
from collections.abc import Iterable, Sequence

# What the command line ends with: done, the run failed, bad input, interrupted or stopped.
EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class GraftstackError(Exception):
    """Base of all errors meant for the user; `exit_status` is what the command line ends with."""

    exit_status = EXIT_FAILED


class BadInputError(GraftstackError):
    """What the user gave can't be used; nothing was started and nothing was written."""

    exit_status = EXIT_BAD_INPUT


class ConfigError(BadInputError):
    """A key or value of the configuration breaks a rule."""


class DataError(BadInputError):
    """The data can't be read or can't be learnt from."""


class WeightsError(BadInputError):
    """A weights file or name doesn't fit the backbone, or can't be trusted."""


class RunError(BadInputError):
    """A run folder is missing, in use, or can't be written."""


class TrainingError(GraftstackError):
    """Training started and failed, e.g. the loss became NaN."""


class OutOfMemoryError(GraftstackError):
    """The device has no room for a step; other ranks of a group may have had it."""


class StorageError(GraftstackError):
    """A place can't be written or read, and the next attempt would fare no better; what was there is untouched."""


class StorageFullError(StorageError):
    """There is no room left."""


class StorageUnreachableError(StorageError):
    """A place at a URI can't be asked, or refuses. At the start of a job that is bad input."""

    exit_status = EXIT_BAD_INPUT


def did_you_mean(value: str, known: Iterable[str], *, num: int = 3) -> str:
    """Returns ``did you mean a, b?`` with the nearest of `known`, or ``known: ...`` when none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=num, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    shown = ", ".join(names[:12])
    return f"known: {shown}{', …' if len(names) > 12 else ''}"


def some_of(names: Sequence[str], *, num: int = 5) -> str:
    """Returns ``a, b and 3 more``: the first `num` names, and how many others there are."""
    return ", ".join(names[:num]) + (f" and {len(names) - num} more" if len(names) > num else "")
