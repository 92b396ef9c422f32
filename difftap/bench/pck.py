"""Compute PCK, the percentage of correct keypoints, with pure functions on arrays. Values are fractions, 0 to 1.

Every mean is made from two counts per pair: its points, and its points that are right. A pair without points has no
share of right points; it is left out of every mean, and is counted.

Axis letters: T points of one pair; P pairs; K thresholds; B bootstrap draws; M the target's visible keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.bench.bootstrap import draw_counts, percentile_interval
from difftap.bench.protocols import AGGREGATES
from difftap.errors import InputError

__all__ = ["TIE", "Tally", "aggregate", "box_side", "draws", "extent", "intervals", "rival", "within"]

TIE = 1e-9
"""A distance counts as equal to a threshold t if they differ by at most ``TIE * (1 + t)``, which only rounding causes.

For example, ``0.1 * 70`` is 7.000000000000001 in binary, but a point 7 pixels away is on that threshold, not below it.
"""

_DRAWS = 256  # resamplings computed together, which bounds the memory


def box_side(box: Sequence[float]) -> float:
    """Give the longer side of a box ``(x1, y1, x2, y2)`` in pixels; 0 if x2 < x1 and y2 < y1."""
    return max(0.0, box[2] - box[0], box[3] - box[1])


def extent(points: ArrayLike) -> float:
    """Give the longer side of the box around points ``(T, 2)``, without points that are not finite (padding); or 0."""
    xy = np.reshape(np.asarray(points, np.float64), (-1, 2))
    xy = xy[np.isfinite(xy).all(axis=1)]
    return float(np.max(np.ptp(xy, axis=0))) if len(xy) else 0.0


def within(distance: ArrayLike, length: ArrayLike, alphas: ArrayLike, strict: bool) -> NDArray[np.bool_]:
    """Tell which points are right: those whose distance is within alpha times length, ``(T, K)``.

    Args:
        distance: ``(T,)``; infinite or NaN where nothing was found, which is never right.
        length: a number or ``(T,)``: the length that alpha is a share of, in the distances' unit.
        alphas: ``(K,)``.
        strict: compare with ``<`` instead of ``<=``.
    """
    limit = np.reshape(np.asarray(length, np.float64), (-1, 1)) * np.asarray(alphas, np.float64)  # (T or 1, K)
    slack = TIE * (1.0 + limit)
    far = np.reshape(np.asarray(distance, np.float64), (-1, 1))
    right: NDArray[np.bool_] = far < limit - slack if strict else far <= limit + slack
    return right


def rival(found: NDArray[np.float64], others: NDArray[np.float64], same: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the distance ``(T,)`` from each place found to the nearest other visible keypoint; infinite without one.

    PCK-dagger (Aygun and Mac Aodha, ECCV 2022) counts a point as right only if no other keypoint is nearer to the place
    found than the correct one.

    Args:
        found: ``(T, 2)``, the places found.
        others: ``(M, 2)``, all visible keypoints of the target.
        same: ``(T, M)``, whether the point and the visible keypoint are the same keypoint.
    """
    if not len(others):
        return np.full(len(found), np.inf)
    apart = np.linalg.norm(found[:, None, :] - others[None, :, :], axis=2)  # (T, M)
    nearest: NDArray[np.float64] = np.where(same | ~np.isfinite(apart), np.inf, apart).min(axis=1)
    return nearest


@dataclass(frozen=True)
class Tally:
    """The counts of each pair.

    Attributes:
        classes: names of the classes.
        members: ``(P,)``, each pair's class as an index into ``classes``.
        points: ``(P,)``, number of the pair's points.
        hits: ``(P, K)``, number of its points that are right, at each threshold.

    Raises:
        InputError: the arrays differ in length, or a pair has more hits than points.
    """

    classes: tuple[str, ...]
    members: NDArray[np.int64]
    points: NDArray[np.int64]
    hits: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not (len(self.members) == len(self.points) == len(self.hits)) or self.hits.ndim != 2:
            raise InputError(
                f"{len(self.members)} classes, {len(self.points)} counts and {self.hits.shape} hits differ"
            )
        if (self.hits > self.points[:, None]).any() or (self.hits < 0).any():
            raise InputError("a pair has more points right than it has points")

    def select(self, chosen: NDArray[np.bool_]) -> Tally:
        """Give the counts of the pairs that a mask ``(P,)`` chooses."""
        return Tally(self.classes, self.members[chosen], self.points[chosen], self.hits[chosen])


def aggregate(tally: Tally, by: str, weights: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
    """Average PCK over pairs.

    A class without points is left out of a mean over classes.

    Args:
        tally: the counts.
        by: the mean, one of `AGGREGATES`.
        weights: ``(B, P)``, how often each pair is drawn in each resampling; None for every pair once.

    Returns:
        ``(B, K)``, or ``(K,)`` without weights; NaN if there is nothing to average.

    Raises:
        InputError: there is no such mean.
    """
    if by not in AGGREGATES:
        raise InputError(f"aggregate is {by!r}; allowed: {', '.join(AGGREGATES)}")
    if weights is not None and len(weights) > _DRAWS:  # in blocks, so that no float64 copy of all draws is made
        blocks = [aggregate(tally, by, weights[start : start + _DRAWS]) for start in range(0, len(weights), _DRAWS)]
        return np.concatenate(blocks)
    drawn = np.ones((1, len(tally.points))) if weights is None else np.asarray(weights, np.float64)
    points = tally.points.astype(np.float64)
    some = points > 0
    # Each mean is a ratio of sums: shares over pairs, or hits over points.
    if by.endswith("image"):
        top = tally.hits / np.where(some, points, 1.0)[:, None]  # (P, K), each pair's share
        bottom = some.astype(np.float64)
    else:
        top, bottom = tally.hits.astype(np.float64), points
    if not by.startswith("class"):
        result = _ratio(drawn @ top, drawn @ bottom)
    else:
        shares = []
        for k in range(len(tally.classes)):
            inside = tally.members == k
            shares.append(_ratio(drawn[:, inside] @ top[inside], drawn[:, inside] @ bottom[inside]))  # (B, K)
        stacked = np.stack(shares) if shares else np.full((1, len(drawn), tally.hits.shape[1]), np.nan)
        present = ~np.isnan(stacked)
        result = _ratio(np.where(present, stacked, 0.0).sum(axis=0), present.sum(axis=0).astype(np.float64))
    return result[0] if weights is None else result


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    if bottom.ndim < top.ndim:
        bottom = bottom[..., None]
    result = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    np.divide(top, bottom, out=result, where=bottom > 0)
    return result


def draws(pairs: int, count: int = 1000, seed: int = 0) -> NDArray[np.uint16]:
    """Draw resamplings with replacement: how often each pair is drawn in each of ``count`` resamplings, ``(B, P)``.

    They depend only on the seed and the number of pairs, so two results over the same pairs are resampled alike.
    """
    stream = np.random.Generator(np.random.Philox(key=np.array([seed, pairs], np.uint64)))
    weights = np.empty((count, pairs), np.uint16)  # a quarter of int64's memory; no pair is drawn 65,536 times
    for b in range(count):
        weights[b] = draw_counts(stream, pairs)
    return weights


def intervals(
    tally: Tally, by: str, weights: NDArray[np.integer], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the bootstrap interval of `aggregate` over pairs.

    Pairs share images, so they are not independent, and the true interval is somewhat wider.

    Args:
        tally: the counts.
        by: the mean, one of `AGGREGATES`.
        weights: the resamplings (`draws`), ``(B, P)``.
        level: share of the draws inside the interval, 0 to 1.

    Returns:
        lower and upper ends, ``(K,)`` each.
    """
    return percentile_interval(aggregate(tally, by, weights), level)
