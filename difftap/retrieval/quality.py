"""How well a search finds objects of the query's class in other images: recall, mean average precision, kNN classes.

A query's hits are the rows of the index in the order of their score, less those of its own image (leave one image
out). A row is relevant if it is of the query's class. Axis letters: Q queries; K hits; N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


_BLOCK_BYTES = 64 << 20


def prepared_blocks(vectors: NDArray[Any], space: IndexMetric) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Where each block of vectors starts, and the block prepared; the vectors may be memory-mapped."""
    step = max(1, _BLOCK_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        yield start, space.prepare(np.asarray(vectors[start : start + step]))


class NearestSoFar:
    """The K nearest of all blocks seen so far, for Q prepared queries ``(Q, D)``."""

    def __init__(self, queries: NDArray[np.float32], space: IndexMetric, k: int) -> None:
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


def exact_neighbours(
    vectors: NDArray[Any], queries: NDArray[np.float32], space: IndexMetric, k: int
) -> NDArray[np.int64]:
    """Numbers ``(Q, K)`` of the nearest vectors to prepared queries, nearest first; every vector is looked at."""
    nearest = NearestSoFar(queries, space, k)
    for start, block in prepared_blocks(vectors, space):
        nearest.see(start, block)
    return nearest.rows


def without_self(found: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Keep the first K of each row of ``found`` ``(Q, K + 1)`` that are not the query's own ``(Q,)``; -1 at the end."""
    others = found != own[:, None]
    order = np.argsort(~others, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(found, order, axis=1)
    return np.where(np.take_along_axis(others, order, axis=1), kept, -1)


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Mean share of the exact neighbours ``(Q, K)`` that were found; -1 stands for none on either side."""
    wanted = true >= 0
    hits = (true[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    return float(hits.sum() / max(1, wanted.sum()))


@dataclass(frozen=True, eq=False)
class QueryFigures:
    """Figures of Q queries that have something to find.

    Attributes:
        classes: ``(Q,)`` str.
        found: ``(Q, len(ks))``, whether a relevant row is among the first k hits.
        precision: ``(Q,)``, average precision over the hits looked at.
        voted: ``(Q,)``, whether the nearest hits' vote gives the query's class.
        skipped: queries without a relevant row in another image.
    """

    classes: NDArray[np.str_]
    found: NDArray[np.bool_]
    precision: NDArray[np.float64]
    voted: NDArray[np.bool_]
    skipped: int


@dataclass(frozen=True)
class Quality:
    """Means over queries, overall and by class.

    Attributes:
        queries: number with something to find.
        skipped: number without.
        recall: by k: share of queries with a relevant row among the first k hits.
        mean_average_precision: see `judge`.
        accuracy: share of queries whose class the vote gives.
        class_means: the same three, as means of the classes' means.
        by_class: the same three and the number of queries, by class.
    """

    queries: int
    skipped: int
    recall: dict[int, float]
    mean_average_precision: float
    accuracy: float
    class_means: dict[str, Any]
    by_class: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN becomes None."""
        cleaned: dict[str, Any] = plain(asdict(self))
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
    """Judge some queries' hits.

    Args:
        hits: ``(Q, K)`` rows, nearest first, -1 for none; those of the query's own image may be among them.
        query_classes: ``(Q,)``.
        query_images: ``(Q,)``.
        row_classes: ``(N,)``, of the index.
        row_images: ``(N,)``.
        ks: of recall@k.
        neighbours: hits that vote, a vote each; of the classes with most votes, the one with the nearest hit wins.
        depth: hits looked at, own image left out. Average precision is the sum of the precisions at the relevant hits
            among them, over the number of relevant rows or the depth, whichever is less.
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
    """Find the class that most of the hits have; of several, the one whose nearest hit comes first. None without hits.

    >>> vote(np.array(["cat", "dog", "dog", "cat", "cow"]))
    'cat'
    """
    names, first, counts = np.unique(classes, return_index=True, return_counts=True)
    if not len(names):
        return None
    return str(names[np.lexsort((first, -counts))[0]])


def summarise(parts: Sequence[QueryFigures], ks: Sequence[int]) -> Quality:
    """Means over all queries of some parts."""
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
) -> dict[str, Any]:
    return {
        "recall": {k: _mean(found[:, i].tolist()) for i, k in enumerate(ks)},
        "mean_average_precision": _mean(precision.tolist()),
        "accuracy": _mean(voted.tolist()),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
