"""How many cores there are for a rank."""

import os
from pathlib import Path

from draf_dist.training.backend import DECODE_THREADS

# Decoders take turns at the interpreter between images: more of them must be asked for.
MOST_DECODE_THREADS = 16
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def decode_threads_of(num_ranks: int) -> int:
    """The cores that this process may use, divided by the ranks on this machine: at least 1, at most 16; 2 if nobody knows."""
    cores = _cores()
    return DECODE_THREADS if cores is None else min(max(cores // num_ranks, 1), MOST_DECODE_THREADS)


def _cores() -> int | None:
    # macOS binds no process to cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota()
    return cores if cores is None or quota is None else min(cores, quota)


def _quota() -> int | None:
    """Whole cores that the container may keep busy; None where it has no limit."""
    try:
        limit, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) // int(period), 1)
