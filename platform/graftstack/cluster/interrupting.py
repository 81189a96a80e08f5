"""Interrupting the main thread from another one."""

import signal
from threading import main_thread


def interrupt_main() -> None:
    """Interrupts the main thread as Ctrl-C does, unless it is deaf to that."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have put this process in the background
        if callable(signal.getsignal(number)):
            signal.pthread_kill(main_thread().ident or 0, number)
            return
