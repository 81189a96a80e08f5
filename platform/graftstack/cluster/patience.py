"""How long a job waits for room on a cluster, and what it says meanwhile."""

import time
from collections.abc import Callable

from graftstack.cluster.resources import what_there_is
from graftstack.config.schema import ClusterConfig
from graftstack.errors import TrainingError

# Nobody is told of a wait shorter than this, in seconds; then every so often.
LONG_WAIT_S = 5.0
_SAY_EVERY_S = 60.0


class Patience:
    """A wait for room, which begins anew whenever there was some.

    Args:
        seconds: How long it may take: `cluster.max_wait_s`.
        needed: What there must be room for.
        say: Is told, now and then, what is waited for.
        quiet_s: How long nobody is told; default: `LONG_WAIT_S`.
    """

    def __init__(
        self,
        seconds: float,
        needed: str,
        say: Callable[[str], None] = lambda _: None,
        *,
        quiet_s: float | None = None,
    ) -> None:
        self._seconds = seconds
        self._needed = needed
        self._say = say
        self._quiet_s = LONG_WAIT_S if quiet_s is None else quiet_s
        self.renew()

    def renew(self) -> None:
        """There is room: the next wait begins now."""
        self._began = time.monotonic()
        self._say_at = self._began + self._quiet_s

    def check(self) -> None:
        """Says what is waited for, if it is time to. Raises `TrainingError` once it has been too long."""
        now = time.monotonic()
        left_s = self._began + self._seconds - now
        if left_s <= 0:
            raise TrainingError(
                f"cluster.max_wait_s={self._seconds:g}: no room for {self._needed} came in that time: "
                f"{what_there_is()}; wait longer, or use fewer or smaller workers"
            )
        if now >= self._say_at:
            self._say_at = now + _SAY_EVERY_S
            self._say(f"waiting for room for {self._needed}, {left_s:.0f} s more: {what_there_is()}")


def needed_by(cluster: ClusterConfig, num_workers: int, num_cpus: int) -> str:
    """Returns, for people, what so many workers of so many CPUs need."""
    each = f"{num_cpus} CPUs and {cluster.gpus_per_worker:g} GPUs"
    return f"a worker of {each}" if num_workers == 1 else f"{num_workers} workers of {each} each"
