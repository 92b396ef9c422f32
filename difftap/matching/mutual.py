"""Mutual nearest neighbours among cells: matches that two maps agree on, without being given points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from difftap.matching.dense import TIE

__all__ = ["mutual_nearest", "nearest"]

_BLOCK_VALUES = 1 << 21


def nearest(
    queries: NDArray[np.float64], bank: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Nearest neighbours both ways, from one pass over the similarities.

    Args:
        queries: unit vectors ``(N, D)``.
        bank: unit vectors ``(M, D)``.

    Returns:
        indices ``(N, 1)`` of each query's nearest in the bank, their cosines ``(N, 1)``, higher is nearer, and indices
        ``(M, 1)`` of each bank vector's nearest query. ``-1`` = none, with score ``-inf``, where a side is empty. Of
        cosines within `TIE` of each other the first counts.
    """
    count, size = len(queries), len(bank)
    indices, reverse = np.full(count, -1), np.full(size, -1)
    scores, best = np.full(count, -np.inf), np.full(size, -np.inf)
    block = max(1, _BLOCK_VALUES // max(1, size))
    for start in range(0, count if size else 0, block):
        similarity = queries[start : start + block] @ bank.T  # (n, M)
        top = similarity.max(axis=1)
        indices[start : start + block] = np.argmax(similarity >= top[:, None] - TIE, axis=1)
        scores[start : start + block] = top
        top = similarity.max(axis=0)
        better = top > best + TIE  # a later block must beat an earlier one, or the tie is the earlier one's
        reverse[better] = start + np.argmax(similarity[:, better] >= top[better] - TIE, axis=0)
        best[better] = top[better]
    return indices[:, None], np.clip(scores, -np.inf, 1.0)[:, None], reverse[:, None]


def mutual_nearest(
    queries: NDArray[np.float64], bank: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each query's nearest in the bank where that one's nearest query is the same query.

    Args:
        queries: unit vectors ``(N, D)``.
        bank: unit vectors ``(M, D)``.

    Returns:
        indices ``(N, 1)``, ``-1`` = none, and cosines ``(N, 1)``, higher is nearer, ``-inf`` where none.
    """
    indices, scores, reverse = nearest(queries, bank)
    if not len(bank):
        return indices, scores
    agreed = reverse[indices[:, 0], 0] == np.arange(len(queries))
    return np.where(agreed[:, None], indices, -1), np.where(agreed[:, None], scores, -np.inf)
