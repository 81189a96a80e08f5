"""This machine: what its checks need is read here."""

import os
import resource
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from graftstack.doctor import clusters, machine, packages, sending, storage
from graftstack.doctor.finding import Finding, examine
from graftstack.doctor.torch_facts import load_torch
from graftstack.machine import allowed_cpus, cache_root

_CGROUP = Path("/sys/fs/cgroup")
_SHARED = Path("/dev/shm")  # noqa: S108


def examine_machine(runs_dir: str) -> list[Finding]:
    """Returns the findings of all checks on this machine, in the order of a set-up: software, hardware, Ray.

    Args:
        runs_dir: Where runs are to lie: a path, or a URI, which is tried.
    """
    environ, path = os.environ, sys.path
    num_cpus = allowed_cpus()
    installed = {
        "Python": partial(packages.check_python, sys.version_info[:3]),
        "packages": partial(packages.check_packages, path),
        # Before torch is loaded here, which may compile it.
        "bytecode": partial(packages.check_bytecode, _package_file("torch"), environ),
    }
    findings = [examine(name, check) for name, check in installed.items()]
    torch = load_torch()
    checks = {
        "torch builds": partial(packages.check_torch_builds, path, torch.load_error),
        "GPUs": partial(machine.check_gpus, torch, driver=machine.cuda_driver(environ), environ=environ),
        "threads": partial(machine.check_threads, environ, num_cpus, torch.num_threads),
        "CPU limit": partial(machine.check_cpu_limit, _CGROUP / "cpu.max", num_cpus),
        "cache folder": partial(machine.check_disk, "cache folder", cache_root(None)),
        "runs folder": partial(storage.check_runs_folder, runs_dir),
        "shared memory": partial(machine.check_shared_memory, _SHARED, machine.memory_bytes(_CGROUP / "memory.max")),
        "open files": partial(machine.check_open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        "Ray": partial(clusters.check_ray, path),
        "Ray clusters": partial(_check_ray_clusters, clusters.address_file(environ)),
        "RAY_ADDRESS": partial(clusters.check_ray_address, environ),
        "token": partial(clusters.check_token, environ, Path.home()),
        "upload": partial(sending.check_upload, sending.everything_sent),
    }
    return findings + [examine(name, check) for name, check in checks.items()]


def _check_ray_clusters(file: Path) -> Finding:
    from graftstack.cluster.running import running_clusters

    return clusters.check_ray_clusters(running_clusters(), clusters.last_cluster(file))


def _package_file(name: str) -> Path | None:
    """Returns the ``__init__.py`` of a package, without importing it."""
    spec = find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None
