"""How many CPU threads the next step should use on a machine that others use too."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")


def busy_seconds() -> float | None:
    """CPU seconds spent by everybody since start-up, over all cores; None where the system does not say."""
    if not STAT.exists():
        return None
    fields = [int(x) for x in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _wait, interrupt, soft, _steal = fields
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class Threads:
    """All threads while the cores are ours, one while somebody else is computing.

    Convolution backward waits at spinning barriers: with a core taken away, two threads were measured five to ten
    times slower than two on free cores, and one thread only twice slower.
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
