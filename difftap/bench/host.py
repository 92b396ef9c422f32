"""What a benchmark says about the machine: threads held, memory at its peak, processor, libraries."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difftap.errors import require
from difftap.machine import available_memory, cpu, gpu, gpu_memory

__all__ = [
    "available_memory",
    "blas",
    "cores",
    "cpu",
    "gpu",
    "gpu_memory",
    "hold_threads",
    "peak_memory",
    "resident_memory",
]


@contextmanager
def hold_threads(threads: int) -> Iterator[None]:
    """Hold BLAS, and torch where it is loaded, to a number of threads; both get their own back afterwards."""
    threadpoolctl = require("threadpoolctl", "bench", "holding BLAS to a number of threads")
    torch: Any = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(threads)
    try:
        with threadpoolctl.threadpool_limits(limits=threads):
            yield
    finally:
        if torch:
            torch.set_num_threads(before)


def resident_memory() -> int:
    """Resident bytes now; the peak so far where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak_memory()


def peak_memory() -> int:
    """Most resident bytes so far.

    Linux's ``ru_maxrss`` outlives exec and so may show the parent's peak; ``VmHWM`` is the process's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas() -> str:
    """Name, version and architecture of the BLAS libraries loaded."""
    pools = require("threadpoolctl", "bench", "naming the BLAS").threadpool_info()
    names = {
        f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}".strip()
        for p in pools
        if p["user_api"] == "blas"
    }
    return ", ".join(sorted(names))
