"""How sure a match is: its margin over the second-best place, and where it leads back to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RADIUS_CELLS", "cell_margins", "cycle_error"]

RADIUS_CELLS = 2.0
"""Places farther than this from the peak, in cells of the target's map, are other places.

Interpolation spreads one cell's peak over its neighbours, so anything nearer is the same peak seen twice. On a 48 x 48
map of a 500 x 375 image two cells are 21 pixels across and 16 down.
"""


def cell_margins(similarity: NDArray[np.float64], peaks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Peak score less the best score farther than `RADIUS_CELLS`, on cells.

    Args:
        similarity: ``(N, h, w)`` cosines; ``-inf`` marks cells that do not count.
        peaks: ``(N,)`` row-major index of each row's best cell.

    Returns:
        margins ``(N,)``, 0 to 2, higher is surer; NaN where no cell lies that far from the peak.
    """
    count, height, width = similarity.shape
    y, x = np.divmod(peaks, width)
    down = np.square(np.arange(height) - y[:, None])  # (N, h)
    right = np.square(np.arange(width) - x[:, None])  # (N, w)
    far = down[:, :, None] + right[:, None, :] > RADIUS_CELLS**2  # (N, h, w)
    second = np.max(np.where(far, similarity, -np.inf), axis=(1, 2), initial=-np.inf)
    margins = similarity[np.arange(count), y, x] - second
    return np.where(np.isfinite(second), np.maximum(margins, 0.0), np.nan)  # a tied cell may be ahead by rounding


def cycle_error(points: NDArray[np.float64], back: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance ``(N,)`` in source pixels from points ``(N, 2)`` to where their matches lead back; NaN where nowhere."""
    return np.hypot(back[:, 0] - points[:, 0], back[:, 1] - points[:, 1])
