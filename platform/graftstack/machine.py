"""What this process may use of the machine, and where it keeps what can be made again."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

# Control groups, version 2: ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``.
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

# Where Linux tells of its memory, and control groups, version 2, of their own.
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")

# Settings of glibc's allocator (malloc.h): how many blocks may be mapped one by one, and how much free memory at the
# end of the heap is too much.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1

# With less than this share of the memory free, nothing more should be begun.
_LEAST_FREE = 0.1


def allowed_cpus() -> int:
    """Returns the CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_limit(cpu_max: Path) -> float | None:
    """Returns how many CPUs' time the control group grants, or None where it sets no limit."""
    quota, _, period = (cpu_max.read_text().strip() if cpu_max.is_file() else "").partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def usable_cpus(cpu_max: Path = _CPU_MAX) -> int:
    """Returns the CPUs that this process may run on, no more than its container's limit allows it to use."""
    limit = cpu_limit(cpu_max)
    return allowed_cpus() if limit is None else max(1, min(allowed_cpus(), int(limit)))


def available_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Returns how much memory can be had without swapping, within the container's limit; None where it isn't known."""
    free = _entry(proc / "meminfo", "MemAvailable:")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        # Pages of files make room by themselves.
        of_files = sum(_entry(cgroup / "memory.stat", name) or 0 for name in ("inactive_file", "active_file"))
        free_of_limit = max(0, limit - used + of_files)
        return free_of_limit if free is None else min(1024 * free, free_of_limit)
    return None if free is None else 1024 * free


def total_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Returns the memory of this machine, no more than its container's limit; None where it isn't known."""
    total, limit = _entry(proc / "meminfo", "MemTotal:"), _number(cgroup / "memory.max")
    if total is None:
        return limit
    return 1024 * total if limit is None else min(1024 * total, limit)


def is_memory_short(proc: Path = _PROC, cgroup: Path = _CGROUP) -> bool:
    """Returns whether so little memory is free that nothing more should be begun; False where it isn't known."""
    available, total = available_bytes(proc, cgroup), total_bytes(proc, cgroup)
    return available is not None and total is not None and available < _LEAST_FREE * total


def out_of_memory_kills(proc: Path = _PROC) -> int:
    """Returns how many processes the kernel has ended for want of memory since it started; 0 where it isn't known."""
    return _entry(proc / "vmstat", "oom_kill") or 0


def _number(path: Path) -> int | None:
    """Returns the number that a file holds, or None if there is none."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _entry(path: Path, name: str) -> int | None:
    """Returns the number behind `name` in a file of a name and a number a line, or None if there is none."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, *values = line.split()
        if key == name:
            return int(values[0])
    return None


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees for what it allocates next, until its end.

    A step of training frees its activations, and the next allocates as many. glibc gives large blocks back to the
    system each time, which then hands out zeroed pages with a fault for each: 15 to 45 % of the time of steps on CPUs
    (cifar_resnet20 at 32 pixels, resnet18 and resnet50 at 224, conv4 at 84). Other C libraries have no such settings,
    and are left alone.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cache_root(cache_dir: str | None) -> Path:
    """Returns `cache_dir`, else $GRAFTSTACK_CACHE, else ~/.cache/graftstack: an absolute path."""
    root = cache_dir or os.environ.get("GRAFTSTACK_CACHE") or "~/.cache/graftstack"
    return Path(root).expanduser().absolute()
