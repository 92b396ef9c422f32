"""Measure how well a search finds objects of the query's class in other images.

The figures are recall, mean average precision and the accuracy of a kNN classifier. A query's hits are the rows of the
index in the order of their score, without those of its own image (leave one image out). A row is relevant if it has the
query's class. Axis letters: Q queries; K hits; N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.table import plain
from difftap.errors import InputError
from difftap.retrieval.distances import pairwise
from difftap.retrieval.kinds import IndexMetric

__all__ = [
    "NearestSoFar",
    "Quality",
    "QueryFigures",
    "exact_neighbours",
    "judge",
    "prepared_blocks",
    "recall",
    "summarise",
    "vote",
    "without_self",
]


_BLOCK_BYTES = 64 << 20  # float32 bytes of a block


def prepared_blocks(vectors: NDArray[np.floating], space: IndexMetric) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield vectors in prepared blocks, with the number of the first one; they may be memory-mapped."""
    step = max(1, _BLOCK_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        yield start, space.prepare(np.asarray(vectors[start : start + step]))


class NearestSoFar:
    """Keep the K nearest vectors of all blocks seen so far, for Q prepared queries ``(Q, D)``."""

    def __init__(self, queries: NDArray[np.float32], space: IndexMetric, k: int) -> None:
        self._queries = queries
        self._space = space
        self._k = k
        self._distances = np.zeros((len(queries), 0))
        self._rows = np.zeros((len(queries), 0), np.int64)

    def see(self, start: int, block: NDArray[np.float32]) -> None:
        """Compare the queries with a block of prepared vectors; ``start`` is the number of its first."""
        if not len(self._queries):
            return
        found = self._distances_to(block)
        few = min(self._k, len(block))
        # Only the block's own K nearest can be among the K nearest of all, so no more than 2 K are ever sorted.
        rows = (
            np.argpartition(found, few - 1, axis=1)[:, :few]
            if few < len(block)
            else np.tile(np.arange(few), (len(found), 1))
        )
        distances = np.concatenate([self._distances, np.take_along_axis(found, rows, axis=1)], axis=1)
        numbers = np.concatenate([self._rows, rows + start], axis=1)
        best = np.argsort(distances, axis=1, kind="stable")[:, : self._k]  # stable: of equals, the first seen
        self._distances = np.take_along_axis(distances, best, axis=1)
        self._rows = np.take_along_axis(numbers, best, axis=1)

    def _distances_to(self, block: NDArray[np.float32]) -> NDArray[np.floating]:
        """Compute numbers ``(Q, B)`` that rank the block for each query; smaller is nearer.

        This is the yardstick of every approximate index, so it is computed in float64: the products of float32 numbers
        are exact there, and vectors far from the origin lose no distance between near ones.
        """
        if self._space.product == "l1":
            return pairwise(self._queries, block, metric="manhattan")
        wide = block.astype(np.float64)
        products = self._queries.astype(np.float64) @ wide.T
        if self._space.product == "ip":
            return np.asarray(-products)
        # |x - y|^2 without |x|^2, which is the same for all vectors of a query's ranking.
        return np.asarray(np.einsum("nd,nd->n", wide, wide) - 2.0 * products)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the vectors ``(Q, K)``, nearest first."""
        return self._rows


def exact_neighbours(
    vectors: NDArray[np.floating], queries: NDArray[np.float32], space: IndexMetric, k: int
) -> NDArray[np.int64]:
    """Find the numbers ``(Q, K)`` of the nearest vectors to prepared queries, nearest first, by comparing them all."""
    nearest = NearestSoFar(queries, space, k)
    for start, block in prepared_blocks(vectors, space):
        nearest.see(start, block)
    return nearest.rows


def without_self(found: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Remove each query's own number from its hits.

    Args:
        found: ``(Q, K + 1)``, nearest first.
        own: ``(Q,)``, the queries' own numbers.
        k: K.

    Returns:
        ``(Q, K)``, in the same order; -1 where there are fewer.
    """
    others = found != own[:, None]
    order = np.argsort(~others, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(found, order, axis=1)
    return np.where(np.take_along_axis(others, order, axis=1), kept, -1)


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Compute the share of the exact neighbours ``true`` ``(Q, K)`` that are in ``found`` ``(Q, K)``; -1 is no hit."""
    wanted = true >= 0
    hits = (true[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    return float(hits.sum() / max(1, wanted.sum()))


@dataclass(frozen=True, eq=False)
class QueryFigures:
    """Figures of the Q queries that have a relevant row in another image.

    Attributes:
        classes: ``(Q,)`` str.
        found: ``(Q, len(ks))``, whether a relevant row is among the first k hits.
        precision: ``(Q,)``, average precision over the hits judged.
        voted: ``(Q,)``, whether the vote of the nearest hits gives the query's class.
        skipped: number of queries without a relevant row in another image.
    """

    classes: NDArray[np.str_]
    found: NDArray[np.bool_]
    precision: NDArray[np.float64]
    voted: NDArray[np.bool_]
    skipped: int


@dataclass(frozen=True)
class Quality:
    """Means over queries, overall and by class. All figures are fractions, 0 to 1.

    Attributes:
        queries: number of queries with a relevant row in another image.
        skipped: number of queries without one.
        recall: k -> share of queries with a relevant row among the first k hits.
        mean_average_precision: see `judge`.
        accuracy: share of queries whose class the vote gives.
        class_means: the same three figures, averaged over classes.
        by_class: the same three figures and the number of queries, for each class.
    """

    queries: int
    skipped: int
    recall: dict[int, float]
    mean_average_precision: float
    accuracy: float
    class_means: JsonObject
    by_class: dict[str, JsonObject]

    def to_dict(self) -> JsonObject:
        """Give plain data for JSON; NaN becomes None."""
        cleaned: JsonObject = plain(asdict(self))
        return cleaned


def judge(
    hits: NDArray[np.int64],
    query_classes: NDArray[np.str_],
    query_images: NDArray[np.str_],
    row_classes: NDArray[np.str_],
    row_images: NDArray[np.str_],
    *,
    ks: Sequence[int] = (1, 5, 10),
    neighbours: int = 5,
    depth: int,
) -> QueryFigures:
    """Judge the hits of some queries.

    Args:
        hits: ``(Q, K)`` rows of the index, nearest first, -1 for none; rows of the query's own image may be among them.
        query_classes: ``(Q,)``.
        query_images: ``(Q,)``.
        row_classes: ``(N,)``, classes of the index's rows.
        row_images: ``(N,)``, their images.
        ks: the values k of recall@k.
        neighbours: number of nearest hits that vote for a class, each with one vote. If several classes have the most
            votes, the one with the nearest hit wins.
        depth: number of hits to judge, without those of the own image. Average precision is the sum of the precisions
            at the relevant hits among them, divided by the number of relevant rows or by the depth, if that is less.

    Raises:
        InputError: a number is below 1 or above the depth.
    """
    if min((*ks, neighbours, depth)) < 1 or max((*ks, neighbours)) > depth:
        raise InputError(f"k is {list(ks)}, neighbours {neighbours}, depth {depth}; allowed: 1 up to the depth")
    found, precision, voted, kept = [], [], [], []
    pairs: dict[tuple[str, str], int] = {}
    classes, counts = np.unique(row_classes, return_counts=True)
    totals = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    for i, (category, image) in enumerate(zip(query_classes.tolist(), query_images.tolist(), strict=True)):
        if (category, image) not in pairs:
            pairs[category, image] = int(((row_classes == category) & (row_images == image)).sum())
        relevant_rows = totals.get(category, 0) - pairs[category, image]
        if relevant_rows == 0:
            continue
        rows = hits[i][hits[i] >= 0]
        rows = rows[row_images[rows] != image][:depth]
        named = row_classes[rows]
        right = named == category
        at = np.flatnonzero(right) + 1  # ranks
        precision.append(float((np.arange(1, len(at) + 1) / at).sum() / min(relevant_rows, depth)))
        found.append([bool(right[:k].any()) for k in ks])
        voted.append(vote(named[:neighbours]) == category)
        kept.append(category)
    return QueryFigures(
        np.array(kept, np.str_),
        np.array(found, bool).reshape(-1, len(ks)),
        np.array(precision, np.float64),
        np.array(voted, bool),
        len(query_classes) - len(kept),
    )


def vote(classes: NDArray[np.str_]) -> str | None:
    """Find the class that most hits have; if several do, the one whose nearest hit comes first. None without hits.

    >>> vote(np.array(["cat", "dog", "dog", "cat", "cow"]))
    'cat'
    """
    names, first, counts = np.unique(classes, return_index=True, return_counts=True)
    if not len(names):
        return None
    return str(names[np.lexsort((first, -counts))[0]])


def summarise(parts: Sequence[QueryFigures], ks: Sequence[int]) -> Quality:
    """Average the figures of all queries of some parts."""
    classes = np.concatenate([part.classes for part in parts]) if parts else np.zeros(0, np.str_)
    found = np.concatenate([part.found for part in parts]) if parts else np.zeros((0, len(ks)), bool)
    precision = np.concatenate([part.precision for part in parts]) if parts else np.zeros(0)
    voted = np.concatenate([part.voted for part in parts]) if parts else np.zeros(0, bool)
    by_class = {}
    for name in sorted(set(classes.tolist())):
        chosen = classes == name
        by_class[name] = {"queries": int(chosen.sum()), **_means(found[chosen], precision[chosen], voted[chosen], ks)}
    overall = _means(found, precision, voted, ks)
    means = {
        "recall": {k: _mean([one["recall"][k] for one in by_class.values()]) for k in ks},
        **{name: _mean([one[name] for one in by_class.values()]) for name in ("mean_average_precision", "accuracy")},
    }
    skipped = sum(part.skipped for part in parts)
    return Quality(len(classes), skipped, **overall, class_means=means, by_class=by_class)


def _means(
    found: NDArray[np.bool_], precision: NDArray[np.float64], voted: NDArray[np.bool_], ks: Sequence[int]
) -> JsonObject:
    return {
        "recall": {k: _mean(found[:, i].tolist()) for i, k in enumerate(ks)},
        "mean_average_precision": _mean(precision.tolist()),
        "accuracy": _mean(voted.tolist()),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan  # fsum: the same in any order of the values
