"""Mutual nearest neighbours: pairs of cells in two images, each of which is the other's nearest neighbour.

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

_BLOCK_VALUES = 1 << 21  # similarities in memory at once, 16 MiB of float64
_BLOCK = 256  # cells whose vectors are in memory at once


def nearest(
    queries: NDArray[np.float64], bank: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Find nearest neighbours in both directions, in one pass over the similarities.

    Args:
        queries: unit vectors ``(N, D)``.
        bank: unit vectors ``(M, D)``.

    Returns:
        indices ``(N, 1)`` of each query's nearest bank vector, their cosines ``(N, 1)``, higher is nearer, and indices
        ``(M, 1)`` of each bank vector's nearest query. If a side is empty, indices are -1 and cosines ``-inf``. Of
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
        better = top > best + TIE  # of queries that tie, the first counts, so a later block must be better by more
        reverse[better] = start + np.argmax(similarity[:, better] >= top[better] - TIE, axis=0)
        best[better] = top[better]
    return indices[:, None], np.clip(scores, -np.inf, 1.0)[:, None], reverse[:, None]


def mutual_nearest(
    queries: NDArray[np.float64], bank: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find each query's nearest bank vector, if that vector's nearest query is the same query.

    Args:
        queries: unit vectors ``(N, D)``.
        bank: unit vectors ``(M, D)``.

    Returns:
        indices ``(N, 1)``, and cosines ``(N, 1)``, higher is nearer; -1 and ``-inf`` where there is none.
    """
    indices, scores, reverse = nearest(queries, bank)
    if not len(bank):
        return indices, scores
    agreed = reverse[indices[:, 0], 0] == np.arange(len(queries))
    return np.where(agreed[:, None], indices, -1), np.where(agreed[:, None], scores, -np.inf)


def agreed_cells(
    source: GridTarget, target: GridTarget, cells: NDArray[np.float64], margin: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Match source cells to the target, keeping matches that match back to the same cell.

    Args:
        source: the source image.
        target: the target image.
        cells: fractional cells ``(N, 2)`` of the source; the nearest whole cell that shows the image is matched.
        margin: also compute margins.

    Returns:
        the target's cells ``(N, 2)``, scores ``(N,)`` and margins ``(N,)``; NaN where a match leads back elsewhere.
    """
    rows, columns = np.flatnonzero(source.cells.any(axis=1)), np.flatnonzero(source.cells.any(axis=0))
    # floor(x + 0.5) rounds every half up; np.rint would round halves to the even neighbour, up or down.
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

    Cells that show only letterbox padding are left out.

    Returns:
        row-major indices ``(N,)`` of the source's cells and of the target's, scores ``(N,)`` and margins ``(N,)``.

    Raises:
        InputError: the maps' cosines are multiplied, so there are no vectors to compare.
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
