"""What this process may use of the machine."""

import os
from pathlib import Path

# Control groups, version 2: ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``.
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(cpu_max: Path = _CPU_MAX) -> int:
    """Returns the CPUs that this process may run on, no more than its container's limit allows it to use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (cpu_max.read_text().strip() if cpu_max.is_file() else "").partition(" ")
    if quota in ("", "max"):
        return allowed
    return max(1, min(allowed, int(quota) // int(period)))
