"""Processor, cores, memory and GPU of this machine, and what a process may use of them. Sizes are in bytes."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

__all__ = [
    "available_cores",
    "available_memory",
    "cpu",
    "cuda_driver",
    "gpu",
    "gpu_memory",
    "peak_memory",
    "resident_memory",
]


def available_cores() -> int:
    """Count the processors that this process may use, which may be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    if affinity is not None:
        return len(affinity(0))  # every command asks this, and importing psutil takes a hundredth of a second
    import psutil

    return psutil.cpu_count() or 1


def available_memory() -> int:
    """Return the memory that processes can still take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Return this process's resident memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the largest resident memory that this process has had so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux keeps ru_maxrss when a process runs another program, so it may be the parent's peak. VmHWM is our own.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@cache
def cuda_driver() -> bool:
    """Tell whether NVIDIA's driver library can be loaded: without it no CUDA runtime works, whatever is installed."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _ask_nvidia(field: str) -> list[str]:
    """Return one field of every NVIDIA GPU, as nvidia-smi prints it; an empty list without a GPU or its driver."""
    # nvidia-smi comes with the driver: it answers where neither torch nor a CUDA toolkit is installed.
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def gpu() -> str | None:
    """Return name and driver of the first NVIDIA GPU; None without one."""
    names, drivers = _ask_nvidia("name"), _ask_nvidia("driver_version")
    return f"{names[0]}, driver {drivers[0]}" if names and drivers else None


def gpu_memory() -> int | None:
    """Return the memory that all processes together use on the first NVIDIA GPU; None without one."""
    used = _ask_nvidia("memory.used")
    return int(used[0]) << 20 if used and used[0].isdigit() else None  # nvidia-smi counts in MiB


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
