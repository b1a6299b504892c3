"""What this process may use of its machine: its container's limits count, not the host's size."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # v2, v1


def usable_cores() -> int:
    """Cores that the scheduler gives us, and no more than the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else cores


def free_memory() -> int:
    """Bytes: what is free on the host, and no more than what is left of the container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, usage in _LIMITS:
        most, used = _read(limit), _read(usage)
        if most.isdecimal() and used.isdecimal():
            free = min(free, max(int(most) - int(used), 0))
    return free


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _read(name: str) -> str:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
