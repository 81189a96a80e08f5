"""The log of a submission to its end: whole and in order, though connections are lost on the way."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from graftstack.cluster.submission import FAILED, STOPPED, Submission, UnreachableError
from graftstack.errors import EXIT_FAILED, EXIT_INTERRUPTED, GraftstackError

# How long a cluster may not be reached before following ends, and how often it is tried until then, in seconds.
_PATIENCE_S = 120.0
_TRY_EVERY_S = 1.0

# How long to wait before a stream is opened again; longer if the one before brought nothing new.
_REOPEN_S = (0.2, 10.0)


class Source(Protocol):
    """A submission, as its cluster tells of it."""

    def find(self) -> Submission | None:
        """Returns the submission as it is now; None: there is no such. Raises `UnreachableError`."""
        ...

    def stream(self) -> Iterator[str]:
        """Yields the log from its start on, and an empty string now and then; ends when the connection does."""
        ...

    def logs(self) -> str:
        """Returns the log as far as it goes. Raises `UnreachableError`."""
        ...


class LostError(GraftstackError):
    """The cluster can't say any more how the job does."""


def follow(
    source: Source,
    *,
    write: Callable[[str], None],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Submission:
    """Writes the log of a submission until that is over, and returns it as it ended.

    A stream that ends says nothing: the status does, and as long as it isn't one of the last ones, another stream is
    opened. Each begins with the first letter of the log, so of each only what wasn't written yet is.

    Args:
        source: The submission.
        write: Gets the log, in parts that needn't be whole lines.
        say: Is told, in a line, what is worth knowing beside it.
        sleep: Passes time, in seconds.
        clock: Tells the time, in seconds.

    Raises:
        LostError: the cluster has been silent for too long, or doesn't know the submission any more.
        BadInputError: the cluster wants another token.
    """
    asked = _Patient(source, say, sleep, clock)
    screen = _Screen(write)
    pause_s = _REOPEN_S[0]
    while not (found := asked.find()).is_over:
        num_before = screen.num_written
        screen.rewind()
        for part in source.stream():
            screen.take(part)
            if not part and asked.find().is_over:
                break
        pause_s = min(2 * pause_s, _REOPEN_S[1]) if screen.num_written == num_before else _REOPEN_S[0]
        sleep(pause_s)
    # Whether the last stream told all of it can't be known.
    try:
        logs = asked.logs()
    except UnreachableError as error:
        say(f"{found.id}: the end of its log can't be read ({error})")
    else:
        screen.rewind()
        screen.take(logs)
    return found


def exit_status(submission: Submission) -> int:
    """Returns what a submission that is over ended with: the exit status of its job, and 130 if it was stopped."""
    if submission.status == STOPPED:
        return EXIT_INTERRUPTED
    code = submission.exit_code or 0
    if submission.status == FAILED and code == 0:  # it never came to run, or was lost
        return EXIT_FAILED
    return 128 - code if code < 0 else code  # as a shell says which signal ended it


class _Screen:
    """Writes a text that comes again and again from its start, each letter once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._at = 0
        self.num_written = 0

    def rewind(self) -> None:
        """What is taken next is the start of the text."""
        self._at = 0

    def take(self, part: str) -> None:
        new = part[max(0, self.num_written - self._at) :]
        self._at += len(part)
        if new:
            self._write(new)
            self.num_written += len(new)


class _Patient:
    """Asks a source again and again while it doesn't answer, within reason."""

    def __init__(
        self, source: Source, say: Callable[[str], None], sleep: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._source = source
        self._say = say
        self._sleep = sleep
        self._clock = clock

    def find(self) -> Submission:
        """Returns the submission as it is now. Raises `LostError`."""
        since = self._clock()
        has_said = False
        while True:
            try:
                found = self._source.find()
            except UnreachableError as error:
                if self._clock() - since > _PATIENCE_S:
                    raise LostError(
                        f"no answer of the cluster for {_PATIENCE_S:.0f} s ({error}); the job may go on, ask later"
                    ) from error
                if not has_said:
                    self._say(f"the cluster doesn't answer ({error}); trying on")
                has_said = True
                self._sleep(_TRY_EVERY_S)
                continue
            if found is None:
                raise LostError(
                    "the cluster knows no such submission any more, as after a restart; submit the job again, its run "
                    "goes on where it was"
                )
            return found

    def logs(self) -> str:
        """Returns the whole log. Raises `UnreachableError`."""
        for _ in range(3):
            try:
                return self._source.logs()
            except UnreachableError:
                self._sleep(_TRY_EVERY_S)
        return self._source.logs()
