"""Whether what a job asks for exists, said before anything starts."""

from typing import NamedTuple

from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError
from graftstack.machine import usable_cpus


class Resources(NamedTuple):
    """CPUs and GPUs of a machine or a cluster."""

    num_cpus: int
    num_gpus: float
    owner: str
    """Whose they are, as a sentence begins: ``this machine``."""


def machine_resources() -> Resources:
    """Returns what this machine has; CPUs that this process may not use don't count."""
    from torch.cuda import device_count

    return Resources(usable_cpus(), device_count(), "this machine")


def cluster_resources() -> Resources:
    """Returns what the connected Ray cluster has, all nodes together."""
    import ray

    total = ray.cluster_resources()
    return Resources(int(total.get("CPU", 0)), total.get("GPU", 0.0), "the cluster")


def check_nodes(cluster: ClusterConfig, num_cpus: int) -> None:
    """Raises `ConfigError` if the workers, of `num_cpus` each, don't fit on the nodes there are: none is cut in two."""
    slots = node_slots(num_cpus, cluster.gpus_per_worker)
    if slots < cluster.min_workers:
        raise ConfigError(
            f"cluster.num_workers={cluster.min_workers}: the nodes there are hold {slots} workers of {num_cpus} "
            f"CPUs and {cluster.gpus_per_worker:g} GPUs; use fewer, or a smaller cluster.cpus_per_worker"
        )


def node_slots(num_cpus: int, num_gpus: float) -> int:
    """Returns how many processes of so many CPUs and GPUs the connected cluster holds: no node is cut in two."""
    import ray

    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            per_gpu = has.get("GPU", 0) // num_gpus if num_gpus else float("inf")
            slots += int(min(has.get("CPU", 0) // num_cpus, per_gpu))
    return slots


def cpus_per_worker(cluster: ClusterConfig, resources: Resources) -> int:
    """Returns the CPUs, and so the threads, of each worker: as configured, or an even share."""
    return cluster.cpus_per_worker or max(1, resources.num_cpus // cluster.max_workers)


def check_resources(cluster: ClusterConfig, resources: Resources) -> None:
    """Raises `ConfigError` if the least number of workers can never run at once: Ray would wait for ever."""
    num = cluster.min_workers
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
