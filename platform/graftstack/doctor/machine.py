"""The machine: GPUs, disks, shared memory, threads and limits."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from graftstack.cluster.node_probe import leading_number
from graftstack.doctor.finding import Finding, Status, gib
from graftstack.doctor.torch_facts import TorchFacts
from graftstack.machine import cpu_limit

_GIB = 1024**3
_LOW_DISK_BYTES, _NO_DISK_BYTES = 5 * _GIB, _GIB // 2
_MIN_SHARED_BYTES = _GIB
# The object store of Ray: this share of the memory, and at most so many bytes.
_OBJECT_STORE_SHARE, _MAX_OBJECT_STORE_BYTES = 0.3, 200 * 10**9
_MIN_OPEN_FILES = 1024


class Usage(Protocol):
    """What `shutil.disk_usage` returns, as far as it is needed."""

    @property
    def total(self) -> int: ...  # noqa: D102

    @property
    def free(self) -> int: ...  # noqa: D102


def check_gpus(torch: TorchFacts, *, driver: str | None, environ: Mapping[str, str]) -> Finding:
    """Torch can use the GPUs that the machine has a driver for; `driver` is where that was found."""
    if torch.gpus:
        return Finding("GPUs", "ok", f"{len(torch.gpus)}: {', '.join(torch.gpus)}")
    if driver is None:
        return Finding("GPUs", "ok", "none: jobs train on the CPU")
    found = f"a CUDA driver is here ({driver}) and torch finds no GPU"
    if not torch.is_loaded:
        return Finding("GPUs", "warn", f"a CUDA driver is here ({driver}) and torch can't be asked", "mend torch first")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.partition(",")[0].strip() in ("", "-1"):
        return Finding(
            "GPUs", "warn", f"{found}: CUDA_VISIBLE_DEVICES={visible} hides all", "unset CUDA_VISIBLE_DEVICES"
        )
    if torch.cuda_build is None:
        return Finding(
            "GPUs",
            "broken",
            f"{found}: this torch is a CPU build",
            "install the CUDA builds of both: uv pip install --reinstall torch torchvision",
        )
    return Finding(
        "GPUs",
        "broken",
        f"{found}: {torch.complaint or f'it is built for CUDA {torch.cuda_build}'}",
        f"update the driver to one for CUDA {torch.cuda_build}, or install torch and torchvision for an older CUDA",
    )


def cuda_driver(environ: Mapping[str, str], *, kernel: Path = Path("/proc/driver/nvidia")) -> str | None:
    """Returns where a CUDA driver shows: the kernel's folder, or nvidia-smi on PATH; None if nowhere."""
    return str(kernel) if kernel.exists() else shutil.which("nvidia-smi", path=environ.get("PATH"))


def check_disk(name: str, folder: Path, *, usage: Callable[[Path], Usage] = shutil.disk_usage) -> Finding:
    """The folder, or the one that it would be made in, has room and can be written."""
    folder = folder.expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    elsewhere = "choose another folder: data.cache_dir=... or GRAFTSTACK_CACHE for the cache, runs_dir=... for runs"
    try:
        # An access bit says little: root passes it on a disk that is mounted read-only.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(name, "broken", f"{folder} can't be written: {error.strerror or error}", elsewhere)
    free = usage(there).free
    detail = f"{folder}: {gib(free)} free"
    status = room(free)
    return Finding(name, status, detail, "" if status == "ok" else f"free some space, or {elsewhere}")


def room(free_bytes: int) -> Status:
    """Returns what so much free space is on a disk that jobs write to."""
    if free_bytes < _NO_DISK_BYTES:
        return "broken"
    return "warn" if free_bytes < _LOW_DISK_BYTES else "ok"


def check_shared_memory(
    folder: Path, memory_bytes: int, *, usage: Callable[[Path], Usage] = shutil.disk_usage
) -> Finding:
    """The shared memory holds the object store that Ray wants on a machine with so much memory."""
    name = "shared memory"
    wanted = max(_MIN_SHARED_BYTES, min(_OBJECT_STORE_SHARE * memory_bytes, _MAX_OBJECT_STORE_BYTES))
    fix = f"mount a larger one: docker run --shm-size={wanted / _GIB:.0f}g, or an emptyDir of medium Memory in a pod"
    if not folder.is_dir():
        return Finding(name, "warn", f"{folder} is missing: Ray keeps its objects on disk", fix)
    total = usage(folder).total
    if total < wanted:
        return Finding(
            name, "warn", f"{folder}: {gib(total)}, and Ray wants {gib(wanted)}: it uses a disk instead", fix
        )
    return Finding(name, "ok", f"{folder}: {gib(total)}")


def memory_bytes(limit: Path) -> int:
    """Returns the memory of the machine, or of the container where the control group's file `limit` says less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(physical, int(text)) if text.isdecimal() else physical


def check_threads(environ: Mapping[str, str], num_cpus: int, torch_threads: int) -> Finding:
    """No library computes with more threads than there are CPUs: they would wait for each other."""
    asked = {key: leading_number(environ.get(key, "")) or 0 for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    asked["torch"] = torch_threads
    excess = [f"{key}={num}" for key, num in asked.items() if num > num_cpus]
    if not excess:
        return Finding("threads", "ok", f"{torch_threads or num_cpus} for {num_cpus} CPUs")
    return Finding(
        "threads",
        "warn",
        f"{', '.join(excess)}: more than the {num_cpus} CPUs that this process may use",
        f"export OMP_NUM_THREADS={num_cpus} MKL_NUM_THREADS={num_cpus}",
    )


def check_cpu_limit(cpu_max: Path, num_cpus: int) -> Finding:
    """The control group (v2) lets all CPUs work; its file `cpu_max` holds ``QUOTA PERIOD`` in microseconds."""
    name = "CPU limit"
    limit = cpu_limit(cpu_max)
    if limit is None:
        return Finding(name, "ok", f"none, {num_cpus} CPUs")
    if limit >= num_cpus:
        return Finding(name, "ok", f"{limit:g} for {num_cpus} CPUs")
    return Finding(
        name,
        "warn",
        f"{limit:g} for {num_cpus} CPUs: as many threads as CPUs are paused when the quota is used up",
        f"raise the container's CPU limit, or set cluster.cpus_per_worker={max(1, int(limit))}",
    )


def check_open_files(soft_limit: int) -> Finding:
    """The process may open as many files and sockets as Ray needs; -1 is no limit."""
    name = "open files"
    if soft_limit < 0:
        return Finding(name, "ok", "no limit")
    if soft_limit < _MIN_OPEN_FILES:
        return Finding(
            name, "warn", f"at most {soft_limit}, and Ray needs {_MIN_OPEN_FILES} or more", "ulimit -n 65536"
        )
    return Finding(name, "ok", f"at most {soft_limit}")
