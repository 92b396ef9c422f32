"""What this machine is: processor, memory, GPU; read from the system, with no library."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

__all__ = ["available_memory", "cpu", "cuda_driver", "gpu", "gpu_memory"]


def available_memory() -> int:
    """Bytes that a process can still take; all of the machine's memory where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def cuda_driver() -> bool:
    """Whether NVIDIA's driver library can be loaded: without it no CUDA runtime works, whatever is installed."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _ask_nvidia(field: str) -> list[str]:
    """One field of every NVIDIA GPU; nothing where there is none or no driver."""
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
    """Name and driver of the first NVIDIA GPU; None without one."""
    names, drivers = _ask_nvidia("name"), _ask_nvidia("driver_version")
    return f"{names[0]}, driver {drivers[0]}" if names and drivers else None


def gpu_memory() -> int | None:
    """Bytes in use on the first NVIDIA GPU, by everybody; None without one."""
    used = _ask_nvidia("memory.used")
    return int(used[0]) << 20 if used and used[0].isdigit() else None


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
