"""How sure a match is, and whether that can be trusted: how much more often surer matches are right.

Three figures come with a match: its cosine ``score``, its ``margin`` over the best other place, and its
``cycle_error``. Each is judged by itself as a ranking of matches, the surest first.

Axis letters: N points; h w cells; T matches.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.errors import InputError

__all__ = [
    "CONFIDENCES",
    "RADIUS_CELLS",
    "RECALLS",
    "auc",
    "cell_margins",
    "cycle_error",
    "expected_error",
    "isotonic",
    "precision_at_recall",
    "reliability",
]

RADIUS_CELLS = 2.0
"""Places farther than this from the peak, in cells of the target's map, are other places.

Interpolation spreads one cell's peak over its neighbours, so anything nearer is the same peak seen twice. On a 48 x 48
map of a 500 x 375 image two cells are 21 pixels across and 16 down.
"""


CONFIDENCES = {"score": 1.0, "margin": 1.0, "cycle_error": -1.0}
"""What tells how sure a match is, and 1 if higher is surer, -1 if lower is."""

RECALLS = (0.25, 0.5, 0.75, 0.9, 1.0)


def cell_margins(similarity: NDArray[np.float64], peaks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the peak score less the best score farther than `RADIUS_CELLS`, on cells.

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
    """Give the distance ``(N,)`` in source pixels from points ``(N, 2)`` to where matches lead back; NaN if nowhere."""
    return np.hypot(back[:, 0] - points[:, 0], back[:, 1] - points[:, 1])


def _checked(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    sure, hits = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if sure.ndim != 1 or sure.shape != hits.shape or not np.isfinite(sure).all():
        raise InputError(f"confidence {sure.shape} and hits {hits.shape} must be equal in length and finite")
    return sure, hits


def auc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Give the chance that a right match is surer than a wrong one (Mann-Whitney, ties count half); 0.5 tells nothing.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``.

    Returns:
        0 to 1; NaN if all matches are right or none is.

    >>> auc([0.9, 0.8, 0.3], [True, False, False])
    1.0
    """
    sure, hits = _checked(confidence, right)
    good, bad = int(hits.sum()), int((~hits).sum())
    if not good or not bad:
        return math.nan
    _, where, counts = np.unique(sure, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[where]  # ties share the mean of their ranks
    return float((ranks[hits].sum() - good * (good + 1) / 2.0) / (good * bad))


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Give the reliability curve: bins of equal number, from least to most sure, and how many of each are right.

    Matches that are equally sure stay together, so bins may be fewer and uneven.
    """
    sure, hits = _checked(confidence, right)
    if bins < 1:
        raise InputError(f"bins is {bins}; allowed: 1 or more")
    if not len(sure):
        return []
    _, where, counts = np.unique(sure, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2.0) / len(sure)  # each value's place among all matches, 0 to 1
    owner = np.minimum((middle * bins).astype(np.int64), bins - 1)[where]
    curve = []
    for b in np.unique(owner):
        inside = owner == b
        curve.append(
            {
                "count": int(inside.sum()),
                "low": float(sure[inside].min()),
                "high": float(sure[inside].max()),
                "mean": float(sure[inside].mean()),
                "right": float(hits[inside].mean()),
            }
        )
    return curve


def precision_at_recall(confidence: ArrayLike, right: ArrayLike, recall: float) -> dict[str, float]:
    """Find the highest bar that still keeps a share of the right matches, and how many of what it keeps are right.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``.
        recall: share of the right matches to keep, above 0 and up to 1.

    Returns:
        ``threshold`` (keep what is at least this sure), ``precision``, ``recall`` reached, ``kept`` share of all.
        NaN throughout if no match is right.
    """
    sure, hits = _checked(confidence, right)
    if not 0 < recall <= 1:
        raise InputError(f"recall is {recall}; allowed: above 0, up to 1")
    if not hits.any():
        return dict.fromkeys(("threshold", "precision", "recall", "kept"), math.nan)
    order = np.argsort(-sure, kind="stable")
    found = np.cumsum(hits[order])
    last = np.append(sure[order][1:] != sure[order][:-1], True)  # ties are kept together
    enough = np.flatnonzero(last & (found >= recall * found[-1] - 1e-9))[0]
    return {
        "threshold": float(sure[order][enough]),
        "precision": float(found[enough] / (enough + 1)),
        "recall": float(found[enough] / found[-1]),
        "kept": float((enough + 1) / len(sure)),
    }


def isotonic(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Turn confidence into probability: rising steps nearest to the hits in least squares (pool adjacent violators).

    Returns:
        the lowest confidence of each step, rising, and the steps' probabilities, rising.
    """
    sure, hits = _checked(confidence, right)
    values, where = np.unique(sure, return_inverse=True)
    weight = np.bincount(where, minlength=len(values)).astype(np.float64)
    level = np.bincount(where, weights=hits.astype(np.float64), minlength=len(values)) / np.maximum(weight, 1.0)
    starts: list[int] = []
    means: list[float] = []
    loads: list[float] = []
    for k in range(len(values)):
        starts.append(k)
        means.append(float(level[k]))
        loads.append(float(weight[k]))
        while len(means) > 1 and means[-2] >= means[-1]:
            total = loads[-2] + loads[-1]
            means[-2:] = [(means[-2] * loads[-2] + means[-1] * loads[-1]) / total]
            loads[-2:] = [total]
            starts.pop()
    return values[starts], np.array(means)


def expected_error(confidence: ArrayLike, right: ArrayLike, halves: ArrayLike, bins: int = 10) -> float:
    """Give the expected calibration error of a probability learned on one half of the pairs, judged on the other.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``.
        halves: ``(T,)``, false or true: to which half the match's pair belongs.
        bins: of equal width over the probability.

    Returns:
        mean distance between predicted and observed share, weighted by matches; NaN if a half is empty.
    """
    sure, hits = _checked(confidence, right)
    half = np.asarray(halves, bool)
    if half.all() or not half.any():
        return math.nan
    probability = np.empty(len(sure))
    for side in (False, True):
        edges, steps = isotonic(sure[half != side], hits[half != side])
        place = np.clip(np.searchsorted(edges, sure[half == side], side="right") - 1, 0, len(steps) - 1)
        probability[half == side] = steps[place]
    owner = np.minimum((probability * bins).astype(np.int64), bins - 1)
    gap = sum(abs(float(probability[owner == b].sum() - hits[owner == b].sum())) for b in range(bins))
    return gap / len(sure)
