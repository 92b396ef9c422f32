"""The exact answer, in blocks of bounded memory, and how much of it an index finds.

Axis letters: N vectors; D dimensions; Q queries; K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.retrieval.distances import pairwise
from difftap.retrieval.spaces import Space

__all__ = ["Nearest", "exact_neighbours", "prepared_blocks", "recall", "without_self"]

_BLOCK_BYTES = 64 << 20


def prepared_blocks(vectors: NDArray[Any], space: Space) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Where each block of vectors starts, and the block prepared; the vectors may be memory-mapped."""
    step = max(1, _BLOCK_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        yield start, space.prepare(np.asarray(vectors[start : start + step]))


class Nearest:
    """The K nearest of all blocks seen so far, for Q prepared queries ``(Q, D)``."""

    def __init__(self, queries: NDArray[np.float32], space: Space, k: int) -> None:
        self._queries = queries
        self._space = space
        self._k = k
        self._distances = np.zeros((len(queries), 0))
        self._rows = np.zeros((len(queries), 0), np.int64)

    def see(self, start: int, block: NDArray[np.float32]) -> None:
        """Look at prepared vectors whose first is number ``start``."""
        if not len(self._queries):
            return
        found = self._distances_to(block)
        few = min(self._k, len(block))
        rows = (
            np.argpartition(found, few - 1, axis=1)[:, :few]
            if few < len(block)
            else np.tile(np.arange(few), (len(found), 1))
        )
        distances = np.concatenate([self._distances, np.take_along_axis(found, rows, axis=1)], axis=1)
        numbers = np.concatenate([self._rows, rows + start], axis=1)
        best = np.argsort(distances, axis=1, kind="stable")[:, : self._k]
        self._distances = np.take_along_axis(distances, best, axis=1)
        self._rows = np.take_along_axis(numbers, best, axis=1)

    def _distances_to(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(Q, B)``, smaller is nearer; rankings alone count."""
        if self._space.product == "l1":
            return pairwise(self._queries, block, metric="manhattan")
        products = self._queries @ block.T
        if self._space.product == "ip":
            return np.asarray(-products)
        return np.asarray(np.einsum("nd,nd->n", block, block) - 2.0 * products)

    @property
    def rows(self) -> NDArray[np.int64]:
        """``(Q, K)`` numbers of vectors, nearest first."""
        return self._rows


def exact_neighbours(vectors: NDArray[Any], queries: NDArray[np.float32], space: Space, k: int) -> NDArray[np.int64]:
    """Numbers ``(Q, K)`` of the nearest vectors to prepared queries, nearest first; every vector is looked at."""
    nearest = Nearest(queries, space, k)
    for start, block in prepared_blocks(vectors, space):
        nearest.see(start, block)
    return nearest.rows


def without_self(found: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The first K of each row of ``found`` ``(Q, K + 1)`` that are not the query's own ``(Q,)``; -1 at the end."""
    others = found != own[:, None]
    order = np.argsort(~others, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(found, order, axis=1)
    return np.where(np.take_along_axis(others, order, axis=1), kept, -1)


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Mean share of the exact neighbours ``(Q, K)`` that were found; -1 stands for none on either side."""
    wanted = true >= 0
    hits = (true[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    return float(hits.sum() / max(1, wanted.sum()))
