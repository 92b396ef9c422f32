"""Mutual nearest neighbours among cells: matches that two images agree on.

Axis letters: N queries, points or cells; M vectors of the bank; D descriptor; w h cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.matching.confidence import cell_margins
from difftap.matching.dense import TIE
from difftap.matching.grid import GridTarget, first_best

__all__ = ["agreed_cells", "mutual_cells", "mutual_nearest", "nearest"]

_BLOCK_VALUES = 1 << 21
_BLOCK = 256  # cells whose vectors are held at once


def nearest(
    queries: NDArray[np.float64], bank: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Find nearest neighbours both ways, from one pass over the similarities.

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
    """Find each query's nearest in the bank where that one's nearest query is the same query.

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


def agreed_cells(
    source: GridTarget, target: GridTarget, cells: NDArray[np.float64], margin: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Match the source's cells nearest to fractional cells ``(N, 2)``, where the way back leads to the same cell.

    Returns:
        the target's cells ``(N, 2)``, scores and margins ``(N,)``; NaN where the way back leads elsewhere.
    """
    rows, columns = np.flatnonzero(source.cells.any(axis=1)), np.flatnonzero(source.cells.any(axis=0))
    x = np.clip(np.floor(cells[:, 0] + 0.5).astype(np.int64), columns[0], columns[-1])
    y = np.clip(np.floor(cells[:, 1] + 0.5).astype(np.int64), rows[0], rows[-1])
    own = y * source.cells.shape[1] + x
    similarity = target.similarity(source.at(own))  # (N, h, w)
    peaks = first_best(similarity)
    agreed = first_best(source.similarity(target.at(peaks))) == own
    score = similarity.reshape(len(own), -1)[np.arange(len(own)), peaks]
    margins = cell_margins(similarity, peaks) if margin else np.full(len(own), np.nan)
    there = np.stack(np.divmod(peaks, target.cells.shape[1])[::-1], axis=1)
    return (
        np.where(agreed[:, None], there, np.nan),
        np.where(agreed, score, np.nan),
        np.where(agreed, margins, np.nan),
    )


def mutual_cells(
    source: GridTarget, target: GridTarget
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Find the cells of two images that are each other's nearest neighbour, best score first.

    Cells that show only letterbox padding take no part.

    Returns:
        the source's and the target's cells ``(N,)``, row-major, with scores and margins ``(N,)``.

    Raises:
        InputError: the maps' cosines are multiplied, which leaves no vectors to compare.
    """
    if len(source.descriptors) > 1:
        raise InputError("branches whose cosines are multiplied find no mutual matches; combine them by concat")
    ours, theirs = np.flatnonzero(source.cells), np.flatnonzero(target.cells)
    indices, scores = mutual_nearest(source.at(ours)[0], target.at(theirs)[0])
    order = np.argsort(-scores[:, 0], kind="stable")
    order = order[indices[order, 0] >= 0]
    cells, peaks = ours[order], theirs[indices[order, 0]]
    margin = np.empty(len(order))
    for start in range(0, len(order), _BLOCK):
        part = slice(start, start + _BLOCK)
        margin[part] = cell_margins(target.similarity(source.at(cells[part])), peaks[part])
    return cells, peaks, scores[order, 0], margin
