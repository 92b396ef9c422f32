"""The bootstrap: draw units with replacement, many times, and take the interval of a figure over the draws.

Axis letters: B draws; P units (pairs of images, or images); K figures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError

__all__ = ["check_draws", "draw_counts", "percentile_interval"]


def check_draws(draws: int, level: float) -> None:
    """Check a number of draws and the level of an interval.

    Raises:
        InputError: fewer than one draw, or a level that is not between 0 and 1.
    """
    if draws < 1:
        raise InputError(f"draws is {draws}; allowed: 1 or more")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; allowed: a number between 0 and 1, such as 0.95")


def draw_counts(stream: np.random.Generator, units: int) -> NDArray[np.int64]:
    """Draw as many units as there are, with replacement; count how often each was drawn, ``(P,)``."""
    if not units:
        return np.zeros(0, np.int64)
    return np.bincount(stream.integers(0, units, units), minlength=units)


def percentile_interval(drawn: NDArray[np.float64], level: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute Efron's percentile interval: the quantiles that leave out the same share of the draws on both sides.

    Args:
        drawn: ``(B, K)``, values of K figures in every draw; a draw that is NaN throughout is left out.
        level: share of the draws inside the interval, 0 to 1.

    Returns:
        lower and upper ends, ``(K,)`` each; NaN where no draw has a value.
    """
    check_draws(1, level)
    known = drawn[~np.isnan(drawn).all(axis=1)]
    if not len(known):
        nothing = np.full(drawn.shape[1], np.nan)
        return nothing, nothing
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
