"""Noticing that the head of a cluster is gone, while a job can still say so.

Most of a driver's calls wait for a head that is gone until Ray ends the process, with a last line that tells nobody
what to do.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread, current_thread, main_thread

from graftstack.cluster.interrupting import interrupt_main
from graftstack.cluster.listening import listens
from graftstack.config.schema import ClusterConfig
from graftstack.errors import EXIT_FAILED, TrainingError
from graftstack.reason import reason

_LOOK_EVERY_S, _ANSWER_S = 2.0, 5.0

# For how long Ray tries to reach a head again before it ends the process: its own setting, and its default.
_RAY_TRIES, _RAY_TRIES_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0

# How long before that the main thread is interrupted, or half of the time, and how long it may take to end.
_EARLIER_S, _END_S = 20.0, 10.0

_STDERR = 2


@contextmanager
def minding_head(cluster: ClusterConfig, gcs_address: str) -> Iterator[None]:
    """Interrupts the block, if it is in the main thread, 20 s before Ray would end the process for want of a head.

    To whatever is inside the block that is an interrupt like Ctrl-C. A main thread that waits inside Ray doesn't hear
    it; 10 s later the process is ended with the words of the error.

    Args:
        cluster: What the error names.
        gcs_address: Where the head listens, HOST:PORT.

    Raises:
        TrainingError: the head is gone, whatever is met first of that.
    """
    from ray.exceptions import RayError

    watch = _Watch(gcs_address, str(_gone(cluster, "nobody answers there")))
    if current_thread() is main_thread():
        watch.start()
    try:
        try:
            yield
        except (RayError, OSError, TrainingError) as error:
            if listens(gcs_address, within_s=_ANSWER_S):
                raise
            raise _gone(cluster, reason(error)) from error
        finally:
            watch.end()
    except KeyboardInterrupt as error:
        if not watch.is_gone:
            raise
        raise TrainingError(watch.message) from error


def _gone(cluster: ClusterConfig, why: str) -> TrainingError:
    return TrainingError(
        f"cluster.address={cluster.address}: the cluster is gone ({why}); go on in another one with resume=true and "
        "its cluster.address"
    )


class _Watch(Thread):
    """Looks whether the head is there until `end`; when it is gone, interrupts the main thread or ends all."""

    def __init__(self, gcs_address: str, message: str) -> None:
        super().__init__(daemon=True, name="head")
        self.message = message
        self.is_gone = False
        self._gcs_address = gcs_address
        self._is_over = Event()
        # Nobody is interrupted once it is over.
        self._lock = Lock()

    def end(self) -> None:
        """Lets the main thread alone from now on."""
        with self._lock:
            self._is_over.set()

    def run(self) -> None:
        most_s, heard = _silence_s(), time.monotonic()
        while not self._is_over.wait(_LOOK_EVERY_S):
            if listens(self._gcs_address, within_s=_ANSWER_S):
                heard = time.monotonic()
            elif time.monotonic() - heard > most_s:
                self._give_up()
                return

    def _give_up(self) -> None:
        with self._lock:
            if self._is_over.is_set():
                return
            self.is_gone = True
            interrupt_main()
        if not self._is_over.wait(_END_S):
            with suppress(OSError):
                os.write(_STDERR, f"\ngraftstack: {self.message}\n".encode())
            os._exit(EXIT_FAILED)


def _silence_s() -> float:
    """Returns for how long a head may be silent."""
    try:
        tries_s = float(os.environ.get(_RAY_TRIES, _RAY_TRIES_S))
    except ValueError:
        tries_s = _RAY_TRIES_S
    return tries_s - min(_EARLIER_S, tries_s / 2)
