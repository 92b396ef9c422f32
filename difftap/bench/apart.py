"""Branches that stay apart, matched as one: ``score-sum`` and ``score-product`` (`difftap.bench.fused`).

Axis letters: N points; C channels; W H image pixels; w h cells of the finest grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.bench.fused import FusedMap
from difftap.bench.targets import Joining, Ready, choose_cells
from difftap.coords import Geometry, Size
from difftap.features import FeatureMap
from difftap.matching import Matches
from difftap.matching.confidence import RADIUS_CELLS, cell_margins, cycle_error
from difftap.matching.dense import TIE
from difftap.matching.grid import clip_to_image, content_cells, first_best
from difftap.matching.interpolate import unit

__all__ = ["ApartReady"]


class ApartReady(Ready):
    """Several maps matched as one."""

    def __init__(self, maps: Sequence[FeatureMap], joining: Joining) -> None:
        self._joining = joining
        self._fused = FusedMap(maps, joining.shares, joining.upsample)
        self._inverse: list[NDArray[np.float64]] | None = None
        self._axes: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def match(self, target: Ready, points: NDArray[np.float64], confidence: bool) -> Matches:
        """Match, and lead back for the cycle error."""
        assert isinstance(target, ApartReady)  # noqa: S101 - one Joining makes all of a run's
        pixels, score, margin = target._find(self._queries(points), confidence)
        error = np.full(len(points), np.nan)
        if confidence and len(points):
            back, _, _ = self._find(target._queries(pixels), False)
            error = cycle_error(points, back)
        return Matches(points, pixels, score, margin, error)

    def _queries(self, points: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        matcher = self._joining.matcher
        cells = self._fused.geometry.to_cells(points, self._fused.grid)
        return self._fused.descriptors(cells, matcher.interpolation if matcher.name == "dense" else "bilinear")

    def _find(
        self, queries: list[NDArray[np.float64]], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Pixels ``(N, 2)``, scores and margins ``(N,)`` of unit queries, by part."""
        if self._joining.matcher.name == "dense":
            return self._find_dense(queries, margin)
        return self._find_cells(queries, margin)

    def _score(self, cosines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """One score from the parts' cosines by the share-weighted geometric mean; negative ones count as 0."""
        score = np.ones_like(cosines[0])
        for share, cosine in zip(self._fused.shares, cosines, strict=True):
            score *= np.power(np.clip(cosine, 0.0, 1.0), share)
        return score

    def _find_cells(
        self, queries: list[NDArray[np.float64]], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        matcher, fused = self._joining.matcher, self._fused
        products = fused.products(self._alone(queries))
        similarity = self._score(products) if self._product else np.clip(sum(products), -1.0, 1.0)
        similarity = np.where(content_cells(fused.geometry, fused.grid), similarity, -np.inf)  # (N, h, w)
        cells = choose_cells(similarity, matcher)
        pixels = fused.geometry.to_pixels(cells, fused.grid)
        if self._joining.reading == "centres":
            pixels = clip_to_image(pixels, fused.geometry.image)
        at = fused.descriptors(cells, "bilinear")
        if self._product:
            dots = [np.sum(unit(q) * unit(a), axis=1) for q, a in zip(queries, at, strict=True)]
            score = self._score([np.reshape(dot, (-1, 1, 1)) for dot in dots])[:, 0, 0]
        else:
            score = np.clip(sum(np.sum(q * a, axis=1) for q, a in zip(queries, at, strict=True)), -1.0, 1.0)
        nothing = np.full(len(pixels), np.nan)
        return pixels, score, cell_margins(similarity, first_best(similarity)) if margin and len(pixels) else nothing

    @property
    def _product(self) -> bool:
        return self._joining.combine == "score-product"

    def _alone(self, queries: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """For products, each part's query by itself: unit length, and undoing the share that `products` applies."""
        if not self._product:
            return queries
        return [unit(q) / np.sqrt(share) for q, share in zip(queries, self._fused.shares, strict=True)]

    def _find_dense(
        self, queries: list[NDArray[np.float64]], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        fused, interpolation = self._fused, self._joining.matcher.interpolation
        if self._inverse is None or self._axes is None:
            self._axes = fused.matrices(interpolation)
            self._inverse = fused.part_norms(interpolation) if self._product else [fused.inverse_norms(interpolation)]
        down, across = self._axes
        products = fused.products(self._alone(queries))
        fields = products if self._product else [np.asarray(sum(products))]
        count = len(queries[0])
        pixels, score, margins = np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan)
        rows, columns = _positions(fused.geometry, fused.grid)
        for n in range(count):
            cosines = [down @ field[n] @ across.T * norm for field, norm in zip(fields, self._inverse, strict=True)]
            scores = self._score(cosines) if self._product else cosines[0]
            y, x = divmod(int(np.argmax(scores >= scores.max() - TIE)), scores.shape[1])
            pixels[n], score[n] = (x, y), scores[y, x]
            if margin:
                far = np.square(rows - rows[y])[:, None] + np.square(columns - columns[x]) > (RADIUS_CELLS + 1e-9) ** 2
                margins[n] = max(0.0, score[n] - scores[far].max()) if far.any() else np.nan
        return pixels, np.clip(score, -1.0, 1.0), margins


def _positions(geometry: Geometry, grid: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fractional cell of every pixel row ``(H,)`` and pixel column ``(W,)``."""
    width, height = geometry.image
    diagonal = np.arange(max(width, height), dtype=np.float64)
    cells = geometry.to_cells(np.stack([diagonal, diagonal], axis=1), grid)
    return cells[:height, 1], cells[:width, 0]
