"""Choose the number of CPU threads for the next step, on a machine that other programs use too."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")


def busy_seconds() -> float | None:
    """Give the CPU seconds of all programs since start-up, over all cores; None if the system does not tell."""
    if not STAT.exists():
        return None
    fields = [int(x) for x in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _wait, interrupt, soft, _steal = fields
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class Threads:
    """Use all threads while the cores are free, and one thread while other programs compute.

    The backward pass of convolutions waits at spinning barriers. With one core taken by another program, two threads
    were measured five to ten times slower than on free cores, and one thread only twice slower.
    """

    def __init__(self, most: int, tolerated: float = 0.4) -> None:
        self.most, self.tolerated, self.others = most, tolerated, 0.0
        self._last: tuple[float, float, float] | None = None
        torch.set_num_threads(most)

    def adapt(self) -> None:
        """Set the number of threads from the CPU time that others took since the last call."""
        busy = busy_seconds()
        if busy is None or self.most == 1:
            return
        now = (time.monotonic(), busy, time.process_time())
        if self._last is not None and now[0] - self._last[0] > 0.2:
            wall, total, own = (a - b for a, b in zip(now, self._last, strict=True))
            self.others = max(0.0, total - own) / wall  # cores, on average
            torch.set_num_threads(self.most if self.others <= self.tolerated else 1)
        self._last = now
