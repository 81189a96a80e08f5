"""Whether what a job asks for exists, said before anything starts."""

import os
from typing import NamedTuple

from graftstack.config.schema import ClusterConfig, ClusterKind
from graftstack.errors import ConfigError


class Resources(NamedTuple):
    """CPUs and GPUs of a machine or a cluster."""

    num_cpus: int
    num_gpus: float
    owner: str
    """Whose they are, as a sentence begins: ``this machine``."""


def machine_resources() -> Resources:
    """Returns what this machine has; CPUs that this process may not use don't count."""
    from torch.cuda import device_count

    return Resources(len(os.sched_getaffinity(0)), device_count(), "this machine")


def cluster_resources() -> Resources:
    """Returns what the connected Ray cluster has, all nodes together."""
    import ray

    total = ray.cluster_resources()
    return Resources(int(total.get("CPU", 0)), total.get("GPU", 0.0), "the cluster")


def cpus_per_worker(cluster: ClusterConfig, resources: Resources) -> int:
    """Returns the CPUs, and so the threads, of each worker: as configured, or an even share."""
    return cluster.cpus_per_worker or max(1, resources.num_cpus // cluster.max_workers)


def check_resources(cluster: ClusterConfig, resources: Resources) -> None:
    """Raises `ConfigError` if the least number of workers can never run at once: Ray would wait for ever."""
    num = cluster.min_workers
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
