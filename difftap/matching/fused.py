"""Several branches matched as one, without storing the joined map.

`difftap.matching.combine` joins normalised maps so that the cosine of the joined vectors is the share-weighted mean of
the branches' cosines. All that matching reads of the joined map can be had from its parts: products with a query add
up, and so do the Gram products of neighbouring cells from which lengths between cells follow. A coarse part is brought
to the finest grid channel by channel, or not at all: interpolation is linear, so its products are interpolated instead.

``score-sum`` gives what ``concat`` gives, for every matcher, up to rounding. ``score-product`` takes, in place of the
mean, the share-weighted geometric mean of the branches' cosines at each place, negative ones counting as 0.

Axis letters: N points; C channels; W H image pixels; w h cells of the finest grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.coords import rescale
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.dense import project
from difftap.matching.interpolate import axis_matrix, axis_runs, axis_taps, unit
from difftap.matching.norms import gram_products, inverse_norms

__all__ = ["FusedMap"]

_CHANNELS = 64  # brought to the finest grid together


class FusedMap:
    """One image's branches, matched as one.

    Args:
        maps: the branches' maps ``(C_i, h_i, w_i)`` under one geometry.
        shares: one positive number a map.
        upsample: how coarse maps are brought to the finest grid: ``bilinear`` or ``bicubic``.

    Attributes:
        geometry: of the image.
        grid: ``(w, h)`` of the finest map.
        shares: divided by their sum.
    """

    def __init__(self, maps: Sequence[FeatureMap], shares: Sequence[float], upsample: str = "bicubic") -> None:
        if not maps or len(maps) != len(shares) or not all(math.isfinite(s) and s > 0 for s in shares):
            raise InputError(
                f"{len(maps)} maps with the shares {list(shares)}; allowed: a finite number above 0 for each"
            )
        self.geometry = maps[0].geometry
        if any(one.geometry != self.geometry for one in maps):
            raise InputError("the maps lie differently on their images; fuse maps of one image at one input size")
        self.grid = (max(one.grid[0] for one in maps), max(one.grid[1] for one in maps))
        total = math.fsum(shares)
        self.shares = [share / total for share in shares]
        self._upsample = upsample
        self._parts = [_Part(one.data, self.grid, upsample) for one in maps]

    @property
    def nbytes(self) -> int:
        """Memory beyond the maps themselves, in bytes."""
        return sum(part.inverse.nbytes for part in self._parts)

    def descriptors(self, cells: NDArray[np.float64], interpolation: str) -> list[NDArray[np.float64]]:
        """What the joined map holds at fractional cells ``(N, 2)`` of the finest grid, scaled to length 1, by part.

        Each ``(N, C_i)``; laid side by side they are the joined map's unit vectors.
        """
        width, height = self.grid
        columns, across = axis_taps(cells[:, 0], width, interpolation)  # (N, K) each
        rows, down = axis_taps(cells[:, 1], height, interpolation)
        parts = []
        for part, share in zip(self._parts, self.shares, strict=True):
            vectors = np.zeros((len(cells), part.data.shape[0]))
            for j in range(rows.shape[1]):
                for i in range(columns.shape[1]):
                    weight = (down[:, j] * across[:, i])[:, None]
                    vectors += weight * part.vectors(columns[:, i], rows[:, j])
            parts.append(math.sqrt(share) * vectors)
        length = np.sqrt(sum(np.sum(np.square(part), axis=1, keepdims=True) for part in parts))
        return [part / np.where(length > 0, length, 1.0) for part in parts]

    def products(self, queries: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Each part's dot products of its queries ``(N, C_i)`` with the cells, ``(N, h, w)``; they add up."""
        pairs = zip(self._parts, self.shares, queries, strict=True)
        return [math.sqrt(share) * part.products(query) for part, share, query in pairs]

    def inverse_norms(self, interpolation: str) -> NDArray[np.float64]:
        """One over the length of the joined map's vector at every pixel, ``(H, W)``; 0 where it vanishes."""
        reach = 1 if interpolation == "bilinear" else 3
        grams = sum(
            share * part.grams(reach, self._upsample) for part, share in zip(self._parts, self.shares, strict=True)
        )
        return lengths_from_grams(np.asarray(grams), *self.matrices(interpolation))

    def part_norms(self, interpolation: str) -> list[NDArray[np.float64]]:
        """`inverse_norms` of each part by itself."""
        reach = 1 if interpolation == "bilinear" else 3
        axes = self.matrices(interpolation)
        return [lengths_from_grams(part.grams(reach, self._upsample), *axes) for part in self._parts]

    def matrices(self, interpolation: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights of every pixel row ``(H, h)`` and pixel column ``(W, w)`` over the cells."""
        width, height = self.geometry.image
        rows = self.geometry.to_cells(np.stack([np.zeros(height), np.arange(height)], axis=1), self.grid)[:, 1]
        columns = self.geometry.to_cells(np.stack([np.arange(width), np.zeros(width)], axis=1), self.grid)[:, 0]
        return axis_matrix(rows, self.grid[1], interpolation), axis_matrix(columns, self.grid[0], interpolation)


class _Part:
    """One branch's map, each cell of length 1, seen on the finest grid."""

    def __init__(self, data: NDArray[np.float32], grid: tuple[int, int], upsample: str) -> None:
        lengths = np.sqrt(np.einsum("cyx,cyx->yx", data, data, dtype=np.float64))
        if not np.isfinite(lengths).all():
            raise InputError("the feature map holds NaN or infinity; features must be finite, so extract them again")
        # The map itself is not copied: what scales its cells is kept beside it.
        self.data = data
        self._cell = np.where(lengths > 0, 1.0 / np.where(lengths > 0, lengths, 1.0), 0.0)  # (h_i, w_i)
        (self._height, self._width), (width, height) = data.shape[1:], grid
        self._upsample = upsample
        self.fine = (self._width, self._height) == grid
        if self.fine:
            self.inverse = np.where(lengths > 0, 1.0, 0.0)
            return
        self._columns = rescale(np.arange(width), self._width / width)
        self._rows = rescale(np.arange(height), self._height / height)
        across = axis_runs(self._columns, self._width, upsample, width)
        down = axis_runs(self._rows, self._height, upsample, height)
        self._across = axis_matrix(self._columns, self._width, upsample)  # (w, w_i)
        self._down = axis_matrix(self._rows, self._height, upsample)  # (h, h_i)
        scaled = (data * self._cell).astype(np.float32)
        self.inverse = inverse_norms(scaled, down, across, upsample)  # (h, w)

    def vectors(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Unit vectors ``(N, C)`` at whole cells of the finest grid."""
        if self.fine:
            return unit(self.data[:, rows, columns].T)
        # A window of cells around each point is scaled and read, rather than the whole map.
        cells = np.stack([self._columns[columns], self._rows[rows]], axis=1)
        x, across = axis_taps(cells[:, 0], self._width, self._upsample)
        y, down = axis_taps(cells[:, 1], self._height, self._upsample)
        total = np.zeros((len(cells), self.data.shape[0]))
        for j in range(y.shape[1]):
            for i in range(x.shape[1]):
                scale = down[:, j] * across[:, i] * self._cell[y[:, j], x[:, i]]
                total += scale[:, None] * self.data[:, y[:, j], x[:, i]].T
        return unit(total)

    def products(self, queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """Dot products ``(N, h, w)`` of queries ``(N, C)`` with the unit cells of the finest grid."""
        own = project(queries, self.data) * self._cell
        return own if self.fine else np.matmul(np.matmul(self._down, own), self._across.T) * self.inverse

    def grams(self, reach: int, upsample: str) -> NDArray[np.float64]:
        """`gram_products` of the unit cells of the finest grid."""
        if self.fine:
            scaled, inverse = self.data, self._cell
            grams = gram_products(scaled, reach)
        else:
            down, across = self._down.astype(np.float32), self._across.T.astype(np.float32)
            inverse = self.inverse
            grams = np.zeros((reach + 1, len(down), 2 * reach + 1, across.shape[1]))
            for start in range(0, len(self.data), _CHANNELS):
                block = (self.data[start : start + _CHANNELS] * self._cell).astype(np.float32)
                grams += gram_products(np.matmul(down, block @ across), reach)
        return _scaled(grams, inverse, reach)


def _scaled(grams: NDArray[np.float64], inverse: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Gram products of cells, from those of the cells before each was multiplied by ``inverse`` ``(h, w)``."""
    height, width = inverse.shape
    padded = np.zeros((height + reach, width + 2 * reach))
    padded[:height, reach : reach + width] = inverse
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            grams[dy, :, reach + dx, :] *= inverse * padded[dy : dy + height, reach + dx : reach + dx + width]
    return grams


def lengths_from_grams(
    grams: NDArray[np.float64], down: NDArray[np.float64], across: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One over the length of the interpolated vector at every pixel, ``(H, W)``; 0 where it vanishes.

    Args:
        grams: as `difftap.matching.norms.gram_products`: ``(reach + 1, h, 2 reach + 1, w)``.
        down: ``(H, h)`` weights of pixel rows.
        across: ``(W, w)`` weights of pixel columns.
    """
    reach = len(grams) - 1
    squared = np.zeros((len(down), len(across)))
    for dy in range(reach + 1):
        shifted = _shifted(down, dy) * down  # (H, h)
        columns = np.zeros_like(squared)
        for dx in range(-reach, reach + 1):
            rows = shifted @ grams[dy, :, reach + dx, :]  # (H, w)
            columns += rows @ (_shifted(across, dx) * across).T
        squared += columns
    inverse = np.zeros_like(squared)
    # Unit cells: below a millionth of their length, what is left is rounding.
    np.divide(1.0, np.sqrt(np.maximum(squared, 0.0)), out=inverse, where=squared > 1e-12)
    return inverse


def _shifted(weights: NDArray[np.float64], by: int) -> NDArray[np.float64]:
    """Weights ``(P, cells)`` of the cell ``by`` further on, zero beyond the map."""
    moved = np.zeros_like(weights)
    cells = weights.shape[1]
    if abs(by) < cells:
        moved[:, max(0, -by) : cells - max(0, by)] = weights[:, max(0, by) : cells + min(0, by)]
    return moved
