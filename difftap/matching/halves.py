"""Sums over channels, taken in two halves at once.

Most of dense matching's time goes into passes over the channels of a map, which numpy does on one core; here two
threads share them. The split is the same on every machine, so that sums do not differ by rounding between them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

__all__ = ["sum_in_halves"]

_WORTH = 256  # channels below which a thread costs more than it saves


def sum_in_halves(channels: int, work: Callable[[range], NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of ``work`` over the channels: of its two halves, run at once where that pays.

    Args:
        channels: C.
        work: from a range of channels to their share of the sum.
    """
    if channels < _WORTH:
        return work(range(channels))
    with ThreadPoolExecutor(1) as other:
        second = other.submit(work, range(channels // 2, channels))
        first = work(range(channels // 2))
        return first + second.result()
