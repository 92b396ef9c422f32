"""Confidence: how sure a match is, and how well that predicts whether it is right.

Three figures come with a match: its cosine ``score``, its ``margin`` over the best other place, and its
``cycle_error``. Each is judged separately, as a ranking of matches from most to least sure.

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
"""Distance from the peak, in cells of the target's map, beyond which a place counts as another place.

Interpolation spreads one cell's peak over its neighbours, so a good score nearer than this belongs to the same peak. On
a 48 x 48 map of a 500 x 375 image, two cells are 21 pixels across and 16 down.
"""

CONFIDENCES = {"score": 1.0, "margin": 1.0, "cycle_error": -1.0}
"""The figures of a match that say how sure it is: 1 if higher is surer, -1 if lower is surer."""

RECALLS = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Shares of the right matches at which precision is reported."""


def cell_margins(similarity: NDArray[np.float64], peaks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute margins on cells: the peak's score less the best score farther away than `RADIUS_CELLS`.

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
    # Not below 0: the peak is the first of all cells that tie, and another of them may be ahead by rounding.
    return np.where(np.isfinite(second), np.maximum(margins, 0.0), np.nan)


def cycle_error(points: NDArray[np.float64], back: NDArray[np.float64]) -> NDArray[np.float64]:
    """Measure how far from the source points their matches lead back.

    Args:
        points: source pixels ``(N, 2)``.
        back: source pixels ``(N, 2)`` that the matches were matched back to; NaN where there is none.

    Returns:
        distances ``(N,)`` in source pixels; NaN where there is none.
    """
    return np.hypot(back[:, 0] - points[:, 0], back[:, 1] - points[:, 1])


def _checked(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Convert confidences and hits ``(T,)`` to arrays.

    Raises:
        InputError: their lengths differ, or a confidence is not finite.
    """
    sure, hits = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if sure.ndim != 1 or sure.shape != hits.shape or not np.isfinite(sure).all():
        raise InputError(f"confidence {sure.shape} and hits {hits.shape} must be equal in length and finite")
    return sure, hits


def auc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Compute the chance that a right match is surer than a wrong one: the area under the ROC curve.

    It is the Mann-Whitney statistic; ties count half.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``, whether each match is right.

    Returns:
        0 to 1, where 0.5 is no better than chance; NaN if all matches are right or all are wrong.

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
    """Compute the reliability curve: sort matches into bins of equal counts by confidence, count the right ones.

    Matches that are equally sure stay in one bin, so there may be fewer bins, and uneven ones.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``, whether each match is right.
        bins: their number, at most.

    Returns:
        for each bin, from least to most sure: ``count``, confidences ``low``, ``high`` and ``mean``, and the share
        ``right``.

    Raises:
        InputError: ``bins`` is below 1, or as for `auc`.
    """
    sure, hits = _checked(confidence, right)
    if bins < 1:
        raise InputError(f"bins is {bins}; allowed: 1 or more")
    if not len(sure):
        return []
    _, where, counts = np.unique(sure, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2.0) / len(sure)  # rank of each distinct value, 0 to 1
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
    """Find the highest threshold that keeps a share of the right matches, and the precision of what it keeps.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``, whether each match is right.
        recall: share of the right matches to keep, above 0 and up to 1.

    Returns:
        ``threshold`` (matches at least this sure are kept), ``precision`` of the kept ones, ``recall`` reached, and the
        share of all matches ``kept``. All are NaN if no match is right.

    Raises:
        InputError: ``recall`` is out of range, or as for `auc`.
    """
    sure, hits = _checked(confidence, right)
    if not 0 < recall <= 1:
        raise InputError(f"recall is {recall}; allowed: above 0, up to 1")
    if not hits.any():
        return dict.fromkeys(("threshold", "precision", "recall", "kept"), math.nan)
    order = np.argsort(-sure, kind="stable")
    found = np.cumsum(hits[order])
    last = np.append(sure[order][1:] != sure[order][:-1], True)  # no threshold can part matches that are equally sure
    # 1e-9: the share of a count may round up, and would then ask for one right match more.
    enough = np.flatnonzero(last & (found >= recall * found[-1] - 1e-9))[0]
    return {
        "threshold": float(sure[order][enough]),
        "precision": float(found[enough] / (enough + 1)),
        "recall": float(found[enough] / found[-1]),
        "kept": float((enough + 1) / len(sure)),
    }


def isotonic(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit the chance of being right as a rising step function of confidence.

    Isotonic regression by the pool-adjacent-violators algorithm: the least-squares fit among all rising functions.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``, whether each match is right.

    Returns:
        each step's lowest confidence, and each step's probability; both rise.
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
        while len(means) > 1 and means[-2] >= means[-1]:  # a step that does not rise is merged with the one before
            total = loads[-2] + loads[-1]
            means[-2:] = [(means[-2] * loads[-2] + means[-1] * loads[-1]) / total]
            loads[-2:] = [total]
            starts.pop()
    return values[starts], np.array(means)


def expected_error(confidence: ArrayLike, right: ArrayLike, halves: ArrayLike, bins: int = 10) -> float:
    """Compute the expected calibration error (ECE) of `isotonic`, fitted on one half of the pairs, judged on the other.

    Each half is judged once, with the fit of the other half.

    Args:
        confidence: ``(T,)``, higher is surer.
        right: ``(T,)``, whether each match is right.
        halves: ``(T,)``, the half that the match's pair belongs to: false or true.
        bins: number of bins of equal width over the probability.

    Returns:
        mean difference between predicted and observed share, weighted by matches, 0 to 1; NaN if a half is empty.
    """
    sure, hits = _checked(confidence, right)
    half = np.asarray(halves, bool)
    if half.all() or not half.any():
        return math.nan
    probability = np.empty(len(sure))
    for side in (False, True):
        edges, steps = isotonic(sure[half != side], hits[half != side])
        # A confidence below the lowest step of the other half gets that step's probability.
        place = np.clip(np.searchsorted(edges, sure[half == side], side="right") - 1, 0, len(steps) - 1)
        probability[half == side] = steps[place]
    owner = np.minimum((probability * bins).astype(np.int64), bins - 1)
    gap = sum(abs(float(probability[owner == b].sum() - hits[owner == b].sum())) for b in range(bins))
    return gap / len(sure)
