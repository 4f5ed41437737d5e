"""The cores and the memory of this machine that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from pathlib import Path


def unsupported() -> str | None:
    """Why the project does not run on this machine, or None."""
    system, processor = platform.system(), platform.machine()
    if (system, processor) == ("Linux", "x86_64"):
        return None
    advice = "Use WSL2, which is Linux." if system == "Windows" else "Use such a machine, or a container on one."
    return f"realisid_trt runs on Linux on x86-64 processors; this is {system} on {processor}. {advice}"


def available_cores() -> int:
    """Cores this process may use: the least of its affinity and its container's quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        pass
    return max(1, cores)


def peak_memory_bytes() -> int:
    """The peak memory of this process so far. Linux; else 0."""
    with contextlib.suppress(OSError, StopIteration, ValueError):  # ru_maxrss would be that of a parent, if larger
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return 0


def available_bytes() -> int:
    """Memory that a process may still take, of the system and of its container; 0 if the system does not say."""
    free = 0
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free or limit, max(0, limit - used))
    return free
