"""The command line: how it begins, how it is interrupted, and how it ends."""

import _thread
import errno
import io
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from graftstack.commands import make_parser
from graftstack.errors import EXIT_FAILED, EXIT_INTERRUPTED, GraftstackError

# What swallows an interrupt, or fails by it in ways of its own: modules half imported, and what reads configurations.
# All of it is over soon, so a signal that comes amid it waits, and looks again this often.
_DEAF = {"importlib", "hydra", "omegaconf"}
_LOOK_AGAIN_S = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "-v" in words or "--verbose" in words
    _quiet(verbose=verbose)
    try:
        with _interruptible():
            options = make_parser().parse_args(words)
            status: int = options.run(options)
            print(end="", flush=True)  # does nothing where stdout is closed
    except GraftstackError as error:
        return _complain(str(error), error.exit_status, verbose=verbose)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", EXIT_INTERRUPTED, verbose=verbose)
    except BrokenPipeError:
        # The reader of our output left (`| head`); what it didn't want needs no words.
        _close_stdout()
        return EXIT_FAILED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _close_stdout()
        return _complain("stdout: no space left; free some, or write elsewhere", EXIT_FAILED, verbose=verbose)
    return status


def _close_stdout() -> None:
    """What is buffered can't be written; without this it would be tried once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM interrupt the block as Ctrl-C does; SIGINT stays ignored where a shell put us in the background."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, once nothing of `_DEAF` is running."""
    if not _is_in(_DEAF, frame):
        raise KeyboardInterrupt
    _thread.start_new_thread(_interrupt_later, (number,))


def _interrupt_later(number: int) -> None:
    time.sleep(_LOOK_AGAIN_S)
    os.kill(os.getpid(), number)


def _is_in(packages: set[str], frame: FrameType | None) -> bool:
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] not in packages:
        frame = frame.f_back
    return frame is not None


def _quiet(*, verbose: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module=r"(ray|torch|torchvision|torchmetrics|urllib3)\.")


def _complain(message: str, status: int, *, verbose: bool) -> int:
    if verbose:
        logging.getLogger(__name__).info("traceback", exc_info=True)
    print(f"graftstack: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: str) -> str:
    """Escapes line breaks and control characters, which names, paths and other libraries' messages may hold."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
