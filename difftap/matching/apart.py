"""Branches that stay apart, matched as one: ``score-sum`` and ``score-product`` (`difftap.matching.fused`).

Axis letters: N points; C channels; W H image pixels; w h cells of the finest grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.coords import Size
from difftap.errors import InputError, PointError
from difftap.featuremap import FeatureMap
from difftap.matching.confidence import RADIUS_CELLS, cell_margins, cycle_error
from difftap.matching.dense import TIE
from difftap.matching.fused import FusedMap
from difftap.matching.grid import choose_cells, clip_to_image, content_cells, corner_cells, first_best, mixed
from difftap.matching.interpolate import pixel_cells, unit
from difftap.matching.joining import Joining, Ready
from difftap.matching.points import Matches
from difftap.points import check_inside

__all__ = ["ApartReady"]


class ApartReady(Ready):
    """Several maps matched as one."""

    def __init__(self, maps: Sequence[FeatureMap], joining: Joining) -> None:
        self._joining = joining
        self._fused = FusedMap(maps, joining.shares, joining.upsample)
        self._inverse: list[NDArray[np.float64]] | None = None
        self._axes: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @property
    def image_size(self) -> Size:
        """``(W, H)`` of the image in pixels."""
        return self._fused.geometry.image

    @property
    def nbytes(self) -> int:
        """Memory of the norms, in bytes."""
        return self._fused.nbytes + sum(one.nbytes for one in self._inverse or ())

    def match(self, target: Ready, points: NDArray[np.float64], confidence: bool = True) -> Matches:
        """Match, and lead back for the cycle error."""
        assert isinstance(target, ApartReady)  # noqa: S101 - one Joining makes all of a run's
        pixels, score, margin = target._find(self._queries(points), confidence)
        error = np.full(len(points), np.nan)
        if confidence and len(points):
            back, _, _ = self._find(target._queries(pixels), False)
            error = cycle_error(points, back)
        return Matches(points, pixels, score, margin, error)

    def mutual(self, target: Ready) -> Matches:
        """Refused: `Joining.of` has sums of scores made of a joined map here."""
        raise InputError("branches that are kept apart find no mutual matches by themselves; combine them by concat")

    def heat(self, target: Ready, point: ArrayLike) -> NDArray[np.float32]:
        """The combined similarity ``(H, W)`` of one point with every pixel of the target."""
        assert isinstance(target, ApartReady)  # noqa: S101 - one Joining makes all of a run's
        xy = check_inside(np.reshape(np.asarray(point, np.float64), (-1, 2)), self.image_size, "the source image")
        if len(xy) != 1:
            raise PointError("one point (x, y) is needed for the heat map, in source pixels")
        return next(target._fields(self._queries(xy).vectors)).astype(np.float32)

    def _queries(self, points: NDArray[np.float64]) -> _Queries:
        matcher, fused = self._joining.matcher, self._fused
        cells = fused.geometry.to_cells(points, fused.grid)
        vectors = fused.descriptors(cells, matcher.interpolation if matcher.name == "dense" else "bilinear")
        if matcher.name != "bilinear":
            return _Queries(vectors, vectors)
        indices, weights = corner_cells(cells, content_cells(fused.geometry, fused.grid))
        y, x = np.divmod(indices.ravel(), fused.grid[0])
        corners = fused.descriptors(np.stack([x, y], axis=1).astype(np.float64), "bilinear")
        return _Queries(vectors, corners, weights)

    def _find(
        self, queries: _Queries, margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Pixels ``(N, 2)``, scores and margins ``(N,)`` of the queries."""
        if self._joining.matcher.name == "dense":
            return self._find_dense(queries.vectors, margin)
        return self._find_cells(queries, margin)

    def _score(self, cosines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """One score from the parts' cosines by the share-weighted geometric mean; negative ones count as 0."""
        score = np.ones_like(cosines[0])
        for share, cosine in zip(self._fused.shares, cosines, strict=True):
            score *= np.power(np.clip(cosine, 0.0, 1.0), share)
        return score

    def _find_cells(
        self, queries: _Queries, margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        fused = self._fused
        products = fused.products(self._alone(queries.asked))
        similarity = self._score(products) if self._product else np.clip(sum(products), -1.0, 1.0)
        similarity = np.where(content_cells(fused.geometry, fused.grid), similarity, -np.inf)  # (N, h, w)
        cells = mixed(choose_cells(similarity, self._joining.matcher), queries.weights)
        pixels = fused.geometry.to_pixels(cells, fused.grid)
        if self._joining.reading == "centres":
            pixels = clip_to_image(pixels, fused.geometry.image)
        at = fused.descriptors(cells, "bilinear")
        if self._product:
            dots = [np.sum(unit(q) * unit(a), axis=1) for q, a in zip(queries.vectors, at, strict=True)]
            score = self._score([np.reshape(dot, (-1, 1, 1)) for dot in dots])[:, 0, 0]
        else:
            dots = [np.sum(q * a, axis=1) for q, a in zip(queries.vectors, at, strict=True)]
            score = np.clip(sum(dots), -1.0, 1.0)
        margins = np.full(len(pixels), np.nan)
        if margin and len(pixels):
            margins = mixed(cell_margins(similarity, first_best(similarity)), queries.weights)
        return pixels, score, margins

    @property
    def _product(self) -> bool:
        return self._joining.combine == "score-product"

    def _alone(self, queries: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """For products, each part's query by itself: unit length, and undoing the share that `products` applies."""
        if not self._product:
            return queries
        return [unit(q) / np.sqrt(share) for q, share in zip(queries, self._fused.shares, strict=True)]

    def _fields(self, queries: list[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
        """The combined similarity ``(H, W)`` of each unit query, given by part, with every pixel."""
        fused, interpolation = self._fused, self._joining.matcher.interpolation
        if self._inverse is None or self._axes is None:
            self._axes = fused.matrices(interpolation)
            self._inverse = fused.part_norms(interpolation) if self._product else [fused.inverse_norms(interpolation)]
        down, across = self._axes
        products = fused.products(self._alone(queries))
        fields = products if self._product else [np.asarray(sum(products))]
        for n in range(len(queries[0])):
            cosines = [down @ field[n] @ across.T * norm for field, norm in zip(fields, self._inverse, strict=True)]
            yield self._score(cosines) if self._product else cosines[0]

    def _find_dense(
        self, queries: list[NDArray[np.float64]], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        count = len(queries[0])
        pixels, score, margins = np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan)
        columns, rows = pixel_cells(self._fused.geometry, self._fused.grid)
        for n, scores in enumerate(self._fields(queries)):
            y, x = divmod(int(np.argmax(scores >= scores.max() - TIE)), scores.shape[1])
            pixels[n], score[n] = (x, y), scores[y, x]
            if margin:
                far = np.square(rows - rows[y])[:, None] + np.square(columns - columns[x]) > (RADIUS_CELLS + 1e-9) ** 2
                margins[n] = max(0.0, score[n] - scores[far].max()) if far.any() else np.nan
        return pixels, np.clip(score, -1.0, 1.0), margins


@dataclass(frozen=True)
class _Queries:
    """Unit vectors of N points by part, ``(N, C_i)`` each.

    Attributes:
        vectors: of the points.
        asked: what is looked for: the same, or for ``bilinear`` the four corners of each point, ``(4 N, C_i)``.
        weights: of the corners ``(N, 4)``, or None.
    """

    vectors: list[NDArray[np.float64]]
    asked: list[NDArray[np.float64]]
    weights: NDArray[np.float64] | None = None
