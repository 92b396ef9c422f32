"""Descriptors of one image: its feature maps, one or several, as vectors whose cosines are compared.

Several maps are matched as one, by one of three laws:

- ``concat`` joins the maps into one (`combine`), whose cells hold the shares as factors;
- ``score-sum`` gives the same cosines (the weighted mean of the maps' cosines) without storing the joined map: products
  with a query are summed over the maps, and so are the Gram products that the lengths follow from;
- ``score-product`` takes the weighted geometric mean of the maps' cosines; negative ones count as 0.

A map that is coarser than the finest one is not stored on the finest grid. Interpolation is linear, so its products
with queries are interpolated instead of its channels; where channels are needed, a few are resized at a time.

Axis letters: N points; C channels; w h cells of the finest grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size, rescale
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.interpolate import axis_matrix, axis_runs, sample, unit
from difftap.matching.norms import check_finite, gram_products, inverse_norms, project, scale_grams
from difftap.recipe import INTERPOLATIONS

__all__ = ["Descriptors", "combine", "describe", "mean_cosine"]

_CHANNELS = 64  # resized to the finest grid at once


class Descriptors:
    """The vectors at an image's cells and between them, compared by one cosine.

    Args:
        parts: the maps that a vector is concatenated from.
        geometry: of the image.
        grid: ``(w, h)`` of the finest map.
        share: exponent of this cosine, where several are multiplied.
    """

    def __init__(self, parts: Sequence[_Part], geometry: Geometry, grid: Size, share: float = 1.0) -> None:
        self._parts = tuple(parts)
        self.geometry = geometry
        self.grid = grid
        self.share = share

    @property
    def channels(self) -> int:
        """Number of channels of all maps together, C."""
        return sum(len(part.data) for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Memory of the cells' scale factors, in bytes; the maps themselves are the caller's."""
        return sum(part.scale.nbytes for part in self._parts)

    def pick(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Give the vectors ``(N, C)`` of whole cells."""
        found = [part.pick(columns, rows) for part in self._parts]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def at(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give unit vectors ``(N, C)`` of cells named by row-major index."""
        rows, columns = np.divmod(indices, self.grid[0])
        return unit(self.pick(columns, rows))

    def read(self, cells: NDArray[np.float64], interpolation: str) -> NDArray[np.float64]:
        """Give unit vectors ``(N, C)`` at fractional cells ``(N, 2)``."""
        return unit(self.between(cells, interpolation))

    def between(self, cells: NDArray[np.float64], interpolation: str) -> NDArray[np.float64]:
        """Give the interpolated vectors ``(N, C)`` at fractional cells ``(N, 2)``, not normalised."""
        return sample(self.pick, self.grid, cells, interpolation)

    def products(self, queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multiply unit queries ``(N, C)`` with every cell, ``(N, h, w)``: cosines times the cells' lengths."""
        total, start = np.zeros(()), 0
        for part in self._parts:
            stop = start + len(part.data)
            own = part.products(queries[:, start:stop])
            total, start = own if start == 0 else total + own, stop
        return total

    def grams(self, reach: int) -> NDArray[np.float64]:
        """Give the `gram_products` of the cells, summed over the maps."""
        first, *others = (part.grams(reach) for part in self._parts)
        for other in others:
            first += other
        return first

    def lengths(self) -> NDArray[np.float64]:
        """Give the lengths of the cells' vectors, ``(h, w)``.

        Raises:
            InputError: the map holds NaN or infinity.
        """
        lengths: NDArray[np.float64] = np.sqrt(sum(part.squared() for part in self._parts))
        check_finite(lengths)
        return lengths


class _Part:
    """One map, read on the finest grid.

    Args:
        data: ``(C, h_i, w_i)``. It is not copied: factors for its cells are kept beside it.
        grid: ``(w, h)`` of the finest map.
        upsample: interpolation to the finest grid: ``bilinear`` or ``bicubic``.
        share: this map's share of the cosine: its cells get length ``sqrt(share)``. None leaves lengths as they are.
    """

    def __init__(self, data: NDArray[np.float32], grid: Size, upsample: str = "bilinear", share: float | None = None):
        self.data = data
        self._alone, self._share = share is None, share or 1.0
        self._axes: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        (height, width), (columns, rows) = data.shape[1:], grid
        root = math.sqrt(self._share)  # a cosine is a product of two vectors, so each carries the root of the share
        if self._alone:
            self._cell = np.ones((height, width))
        else:
            lengths = np.sqrt(_squared(data))
            check_finite(lengths)
            self._cell = np.where(lengths > 0, 1.0 / np.where(lengths > 0, lengths, 1.0), 0.0)
        if (width, height) == grid:
            self._cell *= root
            self.scale = self._cell  # (h, w), what a cell of the finest grid is multiplied with
            return
        self._x, self._y = rescale(np.arange(columns), width / columns), rescale(np.arange(rows), height / rows)
        self._upsample = upsample
        self._axes = axis_matrix(self._y, height, upsample), axis_matrix(self._x, width, upsample)  # (h, h_i), (w, w_i)
        # Interpolating unit vectors shortens them, so cells are normalised on the coarse grid and again on the finest.
        down, across = (axis_runs(at, cells, upsample, len(at)) for at, cells in ((self._y, height), (self._x, width)))
        grams = scale_grams(gram_products(data, 1 if upsample == "bilinear" else 3), self._cell)
        self.scale = root * inverse_norms(grams, down, across, lambda y, x: self._between(x, y))

    def _between(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give a coarse map's vectors ``(N, C)`` at cells of the finest grid, not yet normalised there."""
        height, width = self._cell.shape
        cells = np.stack([self._x[columns], self._y[rows]], axis=1)
        return sample(
            lambda x, y: self.data[:, y, x].T * self._cell[y, x, None], (width, height), cells, self._upsample
        )

    def pick(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Give the vectors ``(N, C)`` of whole cells of the finest grid."""
        if self._axes is not None:
            return self._between(columns, rows) * self.scale[rows, columns, None]
        vectors = self.data[:, rows, columns].T
        return vectors if self._alone else vectors * self.scale[rows, columns, None]

    def products(self, queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multiply queries ``(N, C)`` with the cells of the finest grid, ``(N, h, w)``."""
        own = project(queries, self.data)
        if self._axes is not None:
            down, across = self._axes
            own = down @ (own * self._cell) @ across.T
        return own if self._alone else own * self.scale

    def grams(self, reach: int) -> NDArray[np.float64]:
        """Give the `gram_products` of the cells of the finest grid."""
        if self._axes is None:
            grams = gram_products(self.data, reach)
            return grams if self._alone else scale_grams(grams, self.scale)
        down, across = (axis.astype(np.float32) for axis in self._axes)
        grams = np.zeros((reach + 1, len(down), 2 * reach + 1, len(across)))
        for start in range(0, len(self.data), _CHANNELS):  # the whole map on the finest grid would take too much memory
            block = (self.data[start : start + _CHANNELS] * self._cell).astype(np.float32)
            grams += gram_products(np.matmul(down, block @ across.T), reach)
        return scale_grams(grams, self.scale)

    def squared(self) -> NDArray[np.float64]:
        """Give the squared lengths of the cells of the finest grid, ``(h, w)``."""
        return _squared(self.data) if self._alone else np.where(self.scale > 0, self._share, 0.0)


def _squared(data: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give the squared lengths ``(h, w)`` of a map's cells."""
    total: NDArray[np.float64] = np.einsum("cyx,cyx->yx", data, data, dtype=np.float64)
    return total


def mean_cosine(cosines: Sequence[NDArray[np.float64]], descriptors: Sequence[Descriptors]) -> NDArray[np.float64]:
    """Compute the score from the cosines of each of an image's descriptors: their weighted geometric mean.

    A single cosine is returned as it is, -1 to 1. Of several, negative ones count as 0.

    Args:
        cosines: one array for each of the descriptors, all of one shape.
        descriptors: hold the weights, which are their shares.
    """
    if len(cosines) == 1:
        return np.clip(cosines[0], -1.0, 1.0)  # rounding may take it a little beyond 1
    score = np.ones_like(cosines[0])
    for cosine, one in zip(cosines, descriptors, strict=True):
        score *= np.power(np.clip(cosine, 0.0, 1.0), one.share)
    return score


def describe(
    maps: Sequence[FeatureMap], weights: Sequence[float] = (1.0,), upsample: str = "bicubic", law: str = "score-sum"
) -> tuple[Descriptors, ...]:
    """Make descriptors of an image's maps: one, or under ``score-product`` one per map.

    A single map is taken as it is, under any law.

    Args:
        maps: ``(C_i, h_i, w_i)`` of the same image under the same geometry.
        weights: one positive number per map; divided by their sum they are the shares.
        upsample: how coarse maps are resized to the finest grid: ``bilinear`` or ``bicubic``.
        law: ``score-sum`` or ``score-product``; ``concat`` is the sum of maps that `combine` has joined.

    Raises:
        InputError: no map, maps of different images, weights that do not fit, or NaN in one of several maps.
    """
    shares = _check(maps, weights, upsample)
    geometry, grid = maps[0].geometry, _finest(maps)
    if len(maps) == 1:
        return (Descriptors([_Part(maps[0].data, grid)], geometry, grid),)
    if law == "score-product":
        alone = [_Part(one.data, grid, upsample, 1.0) for one in maps]
        return tuple(Descriptors([part], geometry, grid, share) for part, share in zip(alone, shares, strict=True))
    parts = [_Part(one.data, grid, upsample, share) for one, share in zip(maps, shares, strict=True)]
    return (Descriptors(parts, geometry, grid),)


def combine(maps: Sequence[FeatureMap], weights: Sequence[float], upsample: str = "bicubic") -> FeatureMap:
    """Join maps of one image as the poster's dual layer does.

    Each map is L2-normalised per cell, interpolated to the finest grid, normalised again, multiplied by the square root
    of its share and concatenated. The cosine of two joined vectors then is the share-weighted mean of the branches'
    cosines. One map is returned as it is.

    Args:
        maps: maps ``(C_i, h_i, w_i)`` of the same image under the same geometry.
        weights: one positive number per map; divided by their sum they are the shares.
        upsample: ``bilinear`` or ``bicubic``, as `axis_taps`.

    Returns:
        a map ``(sum of C_i, max of h_i, max of w_i)``.

    Raises:
        InputError: no map, maps of different images, or weights that do not fit.
    """
    shares = _check(maps, weights, upsample)
    if len(maps) == 1:
        return maps[0]
    width, height = _finest(maps)
    joined = np.empty((sum(m.channels for m in maps), height, width), np.float32)
    start = 0
    for m, share in zip(maps, shares, strict=True):
        part = joined[start : start + m.channels]
        _resize(_normalised(m.data), upsample, out=part)
        np.multiply(_normalised(part), np.float32(math.sqrt(share)), out=part)
        start += m.channels
    return FeatureMap(joined, maps[0].geometry)


def _check(maps: Sequence[FeatureMap], weights: Sequence[float], upsample: str) -> list[float]:
    """Give the shares, which sum to 1, of maps that can be matched as one."""
    if not maps:
        raise InputError("no feature maps to combine; give at least one")
    if len(weights) != len(maps):
        raise InputError(f"{len(weights)} weights for {len(maps)} feature maps; give one weight per map")
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise InputError(f"weights are {list(weights)}; allowed: finite numbers above 0")
    if upsample not in INTERPOLATIONS:
        raise InputError(f"upsample is {upsample!r}; allowed: {', '.join(INTERPOLATIONS)}")
    for other in maps[1:]:
        if other.geometry != maps[0].geometry:
            raise InputError(
                f"feature maps lie differently on their images: {maps[0].geometry} and {other.geometry}; "
                "combine maps of the same image at the same input size"
            )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _finest(maps: Sequence[FeatureMap]) -> Size:
    return max(m.grid[0] for m in maps), max(m.grid[1] for m in maps)


def _normalised(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale every cell of a map ``(C, h, w)`` to length 1; zero cells stay zero."""
    lengths = np.sqrt(np.einsum("cyx,cyx->yx", data, data, dtype=np.float64))
    return (data / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def _resize(data: NDArray[np.float32], interpolation: str, out: NDArray[np.float32]) -> None:
    """Interpolate a map ``(C, h, w)`` to the grid of ``out`` ``(C, h', w')``, both over the same area."""
    if data.shape == out.shape:
        out[...] = data
        return
    (_, height, width), (_, rows, columns) = data.shape, out.shape
    across = axis_matrix(rescale(np.arange(columns), width / columns), width, interpolation).astype(np.float32)
    down = axis_matrix(rescale(np.arange(rows), height / rows), height, interpolation).astype(np.float32)
    np.matmul(down, data @ across.T, out=out)  # (C, h, w) @ (w, w') -> (C, h, w'); (h', h) @ that -> (C, h', w')
