"""Whether a job may begin on the connected cluster: at once, after a wait, or never."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftstack.cluster.autoscaler import is_hopeless, may_grow
from graftstack.cluster.patience import Patience, needed_by
from graftstack.cluster.resources import check_nodes, check_resources, cluster_resources, needs_of, what_there_is
from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger(__name__)

# How often room is looked for.
_LOOK_EVERY_S = 0.5

# How long a head may be without any worker, as it is when both have just been started.
_JOIN_S = 60.0

# For how long an autoscaler must find that all it may bring wouldn't do: it looks about every five seconds.
_HOPELESS_S = 11.0


def admit(
    cluster: ClusterConfig, *, num_cpus: int, at_once: int | None = None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Returns once the connected cluster has room for workers; nobody else's is taken away for them.

    What it has room for isn't held: who comes in between is waited for as usual.

    Args:
        cluster: How many workers, and what each takes beside its CPUs.
        num_cpus: CPUs of each.
        at_once: How many must fit before any of them can begin; by default the least number of workers.
        say: Is told what is waited for.

    Raises:
        ConfigError: the cluster will never hold the least number of workers.
        TrainingError: it had no room for `cluster.max_wait_s`.
    """
    if cluster.kind is not ClusterKind.ray:  # one that is ours alone neither grows nor is full
        _check(cluster, num_cpus)
        return
    if not _may_grow():
        _await_nodes(cluster, say)
        _check(cluster, num_cpus)
    num = cluster.min_workers if at_once is None else at_once
    with _placed(cluster, num, num_cpus) as group:
        _await_room(group, cluster, needed_by(cluster, num, num_cpus), say)


def _check(cluster: ClusterConfig, num_cpus: int) -> None:
    """Raises `ConfigError` if the nodes there are don't hold the least number of workers."""
    check_resources(cluster, cluster_resources(cluster))
    check_nodes(cluster, num_cpus)


def _may_grow() -> bool:
    from ray.exceptions import RayError

    try:
        return may_grow()
    except RayError as error:  # then the wait will show it
        log.debug("whether nodes may come isn't known: %s", error)
        return True


def _await_nodes(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Waits a little while no node has a CPU, if any will have one."""
    deadline = time.monotonic() + min(_JOIN_S, cluster.max_wait_s)
    has_said = False
    while not cluster_resources(cluster).num_cpus and time.monotonic() < deadline:
        if not has_said:
            say("no node of the cluster has a CPU; waiting for its workers to join")
            has_said = True
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def _placed(cluster: ClusterConfig, num_workers: int, num_cpus: int) -> "Iterator[PlacementGroup]":
    """Asks for room for workers, which an autoscaler sees, and lets go of it in the end."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([needs_of(cluster, num_cpus)] * num_workers, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def _await_room(group: "PlacementGroup", cluster: ClusterConfig, needed: str, say: Callable[[str], None]) -> None:
    patience = Patience(cluster.max_wait_s, needed, say)
    hopeful = time.monotonic()
    while not group.wait(_LOOK_EVERY_S):
        if not _is_hopeless(group):
            hopeful = time.monotonic()
        if time.monotonic() - hopeful >= _HOPELESS_S:
            raise ConfigError(
                f"cluster.num_workers={cluster.num_workers}: {needed} will never fit on this cluster: its autoscaler "
                f"brings no such nodes, and {what_there_is()}; use fewer, or smaller ones"
            )
        patience.check()


def _is_hopeless(group: "PlacementGroup") -> bool:
    """Returns whether the autoscaler thinks so now, of a cluster of which nobody takes anything."""
    from ray.exceptions import RayError

    try:
        # Who is waited for may leave room: only an idle cluster has shown all that it has.
        return is_hopeless(group) and _is_idle()
    except RayError as error:
        log.debug("the autoscaler's view isn't known now: %s", error)
        return False


def _is_idle() -> bool:
    """Returns whether nobody takes any CPU or GPU."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return all(free.get(name, 0.0) >= total.get(name, 0.0) for name in ("CPU", "GPU"))
