"""What a machine or a cluster has, how much of it a job may take, and whether what it asks for exists."""

import math
import sys
from typing import NamedTuple

from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError
from graftstack.machine import usable_cpus

# Fractions don't add up to the last bit: ten tenths of a GPU are one.
_TINY = 1e-6


class Resources(NamedTuple):
    """CPUs and GPUs of a machine or a cluster."""

    num_cpus: int
    num_gpus: float
    owner: str
    """Whose they are, as a sentence begins: ``this machine``."""


def machine_resources(cluster: ClusterConfig) -> Resources:
    """Returns what a job may take of this machine; CPUs that this process may not use don't count."""
    from torch.cuda import device_count

    return _allowed(Resources(usable_cpus(), device_count(), "this machine"), cluster)


def cluster_resources(cluster: ClusterConfig) -> Resources:
    """Returns what a job may take of the connected Ray cluster, all nodes together, as it is now."""
    import ray

    total = ray.cluster_resources()
    return _allowed(Resources(int(total.get("CPU", 0)), total.get("GPU", 0.0), "the cluster"), cluster)


def what_there_is() -> str:
    """Returns, for people, what the connected cluster has, and what of it nobody has taken."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    amounts = [f"{total.get(name, 0):g} {name}s, {free.get(name, 0):g} of them free" for name in ("CPU", "GPU")]
    return f"the {num_nodes} nodes of the cluster have {' and '.join(amounts)}"


def _allowed(there: Resources, cluster: ClusterConfig) -> Resources:
    """Returns what `cluster` allows of what there is."""
    limits = {"max_cpus": (cluster.max_cpus, there.num_cpus), "max_gpus": (cluster.max_gpus, there.num_gpus)}
    words = [f"cluster.{key}={most:g}" for key, (most, num) in limits.items() if most is not None and most < num]
    return Resources(
        cluster.cpus_of(there.num_cpus),
        there.num_gpus if cluster.max_gpus is None else min(there.num_gpus, cluster.max_gpus),
        f"{there.owner}, with {' and '.join(words)}," if words else there.owner,
    )


def check_nodes(cluster: ClusterConfig, num_cpus: int) -> None:
    """Raises `ConfigError` if the workers, of `num_cpus` each, don't fit on the nodes there are: none is cut in two."""
    slots = node_slots(cluster, num_cpus)
    if slots < cluster.min_workers:
        raise ConfigError(
            f"cluster.num_workers={cluster.min_workers}: the nodes there are hold {slots} workers of {num_cpus} "
            f"CPUs and {cluster.gpus_per_worker:g} GPUs; use fewer, or a smaller cluster.cpus_per_worker"
        )


def node_slots(cluster: ClusterConfig, num_cpus: int) -> int:
    """Returns how many workers of so many CPUs a job may have on the connected cluster: no node is cut in two."""
    import ray

    num_gpus = cluster.gpus_per_worker
    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            slots += num_held(has.get("CPU", 0), has.get("GPU", 0), num_cpus, num_gpus)
    return min(slots, most_workers(cluster, num_cpus))


def needs_of(cluster: ClusterConfig, num_cpus: int) -> dict[str, float]:
    """Returns what a worker of so many CPUs takes, as Ray has it."""
    return {"CPU": num_cpus, **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})}


def most_workers(cluster: ClusterConfig, num_cpus: int) -> int:
    """Returns how many workers of so many CPUs a job may have, however large the cluster is."""
    return num_held(cluster.max_cpus, cluster.max_gpus, num_cpus, cluster.gpus_per_worker)


def num_held(cpus: float | None, gpus: float | None, num_cpus: int, num_gpus: float) -> int:
    """Returns how many workers so many CPUs and GPUs hold; None is no limit."""
    per_cpu = sys.maxsize if cpus is None else int(cpus // num_cpus)
    per_gpu = sys.maxsize if gpus is None or not num_gpus else math.floor(gpus / num_gpus + _TINY)
    return min(per_cpu, per_gpu)


def cpus_per_worker(cluster: ClusterConfig) -> int:
    """Returns the CPUs, and so the threads, of each worker on the connected cluster as it is now.

    As configured; or an even share, or less than that where nodes, none of which is cut in two, wouldn't hold the
    least number of workers.
    """
    if cluster.cpus_per_worker is not None:
        return cluster.cpus_per_worker
    num = max(1, cluster_resources(cluster).num_cpus // cluster.max_workers)
    while num > 1 and node_slots(cluster, num) < cluster.min_workers:
        num -= 1
    return num


def check_resources(cluster: ClusterConfig, resources: Resources) -> None:
    """Raises `ConfigError` if the least number of workers can never run at once: Ray would wait for ever."""
    num = cluster.min_workers
    if cluster.kind is ClusterKind.ray and not resources.num_cpus:
        raise ConfigError("cluster=ray: no node of the cluster has a CPU; start its workers, and wait until they join")
    if cluster.kind is not ClusterKind.inline and (cluster.cpus_per_worker or 1) > resources.num_cpus:
        raise ConfigError(
            f"cluster.cpus_per_worker={cluster.cpus_per_worker}: {resources.owner} has {resources.num_cpus} CPUs; "
            "use that many or fewer"
        )
    needed_cpus = num * (cluster.cpus_per_worker or 1)
    if cluster.kind is not ClusterKind.inline and needed_cpus > resources.num_cpus:
        raise ConfigError(
            f"cluster.num_workers={num}: needs {needed_cpus} CPUs and {resources.owner} has {resources.num_cpus}; "
            f"use cluster.num_workers={max(1, resources.num_cpus // (cluster.cpus_per_worker or 1))} or less"
        )
    needed_gpus = num * cluster.gpus_per_worker
    if needed_gpus > resources.num_gpus:
        raise ConfigError(
            f"cluster.gpus_per_worker={cluster.gpus_per_worker:g}: {num} worker(s) need {needed_gpus:g} GPUs and "
            f"{resources.owner} has {resources.num_gpus:g}; use cluster.gpus_per_worker=0, or fewer workers"
        )
