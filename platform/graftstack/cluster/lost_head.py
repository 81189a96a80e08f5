"""Noticing that the head of a cluster is gone, while a job can still say so.

Most of a driver's calls wait for a head that is gone until Ray ends the process, with a last line that tells nobody
what to do.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, current_thread, main_thread

from graftstack.cluster.interrupting import interrupt_main
from graftstack.cluster.listening import listens
from graftstack.config.schema import ClusterConfig
from graftstack.errors import EXIT_FAILED, TrainingError
from graftstack.reason import reason

_LOOK_EVERY_S, _ANSWER_S = 2.0, 5.0

# For how long Ray tries to reach a head again before it ends the process: its own setting, and its default.
_RAY_TRIES, _RAY_TRIES_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0

# How long before that the main thread is interrupted, and how long it may take to end.
_EARLIER_S, _END_S = 20.0, 10.0


@contextmanager
def minding_head(cluster: ClusterConfig, gcs_address: str) -> Iterator[None]:
    """Ends the block, if it is in the main thread, when the head has been silent for almost as long as Ray tries.

    While the main thread waits inside Ray it hears nothing; then the process ends, as by Ray a little later.

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
        yield
    except KeyboardInterrupt as error:
        if not watch.is_gone:
            raise
        raise TrainingError(watch.message) from error
    except (RayError, OSError, TrainingError) as error:
        if listens(gcs_address, within_s=_ANSWER_S):
            raise
        raise _gone(cluster, reason(error)) from error
    finally:
        watch.is_over.set()


def _gone(cluster: ClusterConfig, why: str) -> TrainingError:
    return TrainingError(
        f"cluster.address={cluster.address}: the cluster is gone ({why}); go on in another one with resume=true and "
        "its cluster.address"
    )


class _Watch(Thread):
    """Looks whether the head is there until `is_over`; when it is gone, interrupts the main thread or ends all."""

    def __init__(self, gcs_address: str, message: str) -> None:
        super().__init__(daemon=True, name="head")
        self.message = message
        self.is_over = Event()
        self.is_gone = False
        self._gcs_address = gcs_address
        self._most_s = float(os.environ.get(_RAY_TRIES, _RAY_TRIES_S)) - _EARLIER_S

    def run(self) -> None:
        heard = time.monotonic()
        while not self.is_over.wait(_LOOK_EVERY_S):
            if listens(self._gcs_address, within_s=_ANSWER_S):
                heard = time.monotonic()
            elif time.monotonic() - heard > self._most_s:
                self.is_gone = True
                interrupt_main()
                if not self.is_over.wait(_END_S):
                    os.write(sys.stderr.fileno(), f"\ngraftstack: {self.message}\n".encode())
                    os._exit(EXIT_FAILED)
                return
