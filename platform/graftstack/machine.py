"""What this process may use of the machine, and where it keeps what can be made again."""

import os
from pathlib import Path

# Control groups, version 2: ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``.
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


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


def cache_root(cache_dir: str | None) -> Path:
    """Returns `cache_dir`, else $GRAFTSTACK_CACHE, else ~/.cache/graftstack: an absolute path."""
    root = cache_dir or os.environ.get("GRAFTSTACK_CACHE") or "~/.cache/graftstack"
    return Path(root).expanduser().absolute()
