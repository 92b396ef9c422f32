"""Matchers that work on the target's cells: nearest neighbour and the soft-argmax family.

All take cosines ``(N, h, w)``, with ``-inf`` at cells that do not count (letterbox padding), and return fractional
cells ``(N, 2)`` as ``(x, y)``. The image's geometry converts these to pixels, by the half-pixel rule or by SD4Match's
aligned corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size
from difftap.errors import InputError
from difftap.matching.confidence import cell_margins
from difftap.matching.dense import TIE
from difftap.matching.descriptors import Descriptors, mean_cosine
from difftap.matching.interpolate import axis_taps
from difftap.recipe import Matcher

__all__ = [
    "Corners",
    "GridTarget",
    "choose_cells",
    "clip_to_image",
    "content_cells",
    "corner_cells",
    "first_best",
    "kernel_softargmax",
    "mixed",
    "nearest_cell",
    "softargmax",
    "window_softargmax",
]

_BLOCK_BYTES = 1 << 24  # memory for the similarities of the points that are handled together


def content_cells(geometry: Geometry, grid: Size) -> NDArray[np.bool_]:
    """Tell which cells ``(h, w)`` of a map show a part of the image, and not only padding."""
    x0, y0, x1, y1 = geometry.content
    width, height = grid
    column, row = np.arange(width) * (geometry.input[0] / width), np.arange(height) * (geometry.input[1] / height)
    # A cell that overlaps the image by less than a rounding error, in input pixels, shows nothing of it.
    columns = (column < x1 - 1e-6) & (column + geometry.input[0] / width > x0 + 1e-6)
    rows = (row < y1 - 1e-6) & (row + geometry.input[1] / height > y0 + 1e-6)
    return rows[:, None] & columns


def clip_to_image(points: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """Clip points ``(N, 2)`` to the range of pixel centres, ``[0, W - 1] x [0, H - 1]``; NaN stays NaN.

    The centre of a border cell can lie outside the image: with a letterbox, or if the grid is finer than the image.
    """
    return np.clip(points, 0.0, np.array(size, np.float64) - 1.0)


def first_best(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """Give the row-major index ``(N,)`` of each row's best cosine, ``(N, ...)``; of those within `TIE`, the first."""
    flat = similarity.reshape(len(similarity), math.prod(similarity.shape[1:]))  # numpy's -1 would fail on no rows
    best: NDArray[np.int64] = np.argmax(flat >= flat.max(axis=1, keepdims=True) - TIE, axis=1)
    return best


def nearest_cell(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Match by ``nn``: the best cell of each row, ``(N, h, w)`` to ``(N, 2)``."""
    y, x = np.divmod(first_best(similarity), similarity.shape[2])
    return np.stack([x, y], axis=1).astype(np.float64)


def softargmax(similarity: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Match by ``softargmax``: the mean cell ``(N, 2)`` under a softmax over all cosines ``(N, h, w)``.

    Args:
        similarity: ``(N, h, w)`` cosines.
        temperature: the cosines are divided by it before the softmax (SD4Match: 0.04).
    """
    _, height, width = similarity.shape
    peak = np.max(similarity, axis=(1, 2), keepdims=True)
    # Less the peak, so that exp never overflows; the softmax does not change. exp(-inf) is 0, so padding has no weight.
    weights = np.exp((similarity - peak) / temperature)
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    x = weights.sum(axis=1) @ np.arange(width)
    y = weights.sum(axis=2) @ np.arange(height)
    return np.stack([x, y], axis=1)


def kernel_softargmax(similarity: NDArray[np.float64], temperature: float, sigma: float) -> NDArray[np.float64]:
    """Match by ``kernel-softargmax``: multiply cosines by a Gaussian around the best cell, then `softargmax`.

    As in SD4Match, and in SFNet before it.

    Args:
        similarity: ``(N, h, w)`` cosines.
        temperature: of the softmax (SD4Match: 0.04).
        sigma: standard deviation of the Gaussian, in cells (SD4Match: 7).
    """
    right, down = _from_best(similarity)
    kernel = np.exp(-(np.square(down)[:, :, None] + np.square(right)[:, None, :]) / (2 * sigma**2))  # (N, h, w)
    # Far from the peak the kernel underflows to 0, and 0 * -inf would be NaN: so padding is set to -inf afterwards.
    present = similarity > -np.inf
    return softargmax(np.where(present, np.where(present, similarity, 0.0) * kernel, -np.inf), temperature)


def window_softargmax(similarity: NDArray[np.float64], temperature: float, window: int) -> NDArray[np.float64]:
    """Match by ``window-softargmax``: set cosines outside a window around the best cell to 0, then `softargmax`.

    As in GeoAware-SC. It is zero, and not minus infinity, as there: cells outside the window keep a small weight, which
    pulls the result a little towards the map's centre.

    Args:
        similarity: ``(N, h, w)`` cosines.
        temperature: of the softmax (GeoAware-SC: 0.02).
        window: the square window's side in cells, odd (GeoAware-SC, zero-shot: 11).
    """
    right, down = _from_best(similarity)
    inside = (np.abs(down) <= window // 2)[:, :, None] & (np.abs(right) <= window // 2)[:, None, :]
    return softargmax(np.where(inside | (similarity == -np.inf), similarity, 0.0), temperature)


def corner_cells(
    cells: NDArray[np.float64], content: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the four cells around each fractional cell, for SD4Match's ``bilinear`` matcher.

    Args:
        cells: ``(N, 2)`` on the source's map.
        content: ``(h, w)``, the cells that show a part of the image; any other is replaced by the nearest of these.

    Returns:
        row-major indices ``(N, 4)`` and bilinear weights ``(N, 4)`` that sum to 1.
    """
    columns, rows = np.flatnonzero(content.any(axis=0)), np.flatnonzero(content.any(axis=1))
    x, across = axis_taps(np.clip(cells[:, 0], columns[0], columns[-1]), content.shape[1], "bilinear")  # (N, 2) each
    y, down = axis_taps(np.clip(cells[:, 1], rows[0], rows[-1]), content.shape[0], "bilinear")
    indices = y[:, :, None] * content.shape[1] + x[:, None, :]  # (N, 2, 2)
    # A keypoint on the last cell reads the cell after it with weight 0. Clamped to the map, it changes nothing.
    return indices.reshape(-1, 4), (down[:, :, None] * across[:, None, :]).reshape(-1, 4)


def choose_cells(similarity: NDArray[np.float64], matcher: Matcher) -> NDArray[np.float64]:
    """Match each row of cosines ``(N, h, w)`` to a cell ``(N, 2)``; for ``bilinear`` a row belongs to a corner."""
    if matcher.name == "softargmax":
        return softargmax(similarity, matcher.temperature)
    if matcher.name == "kernel-softargmax":
        return kernel_softargmax(similarity, matcher.temperature, matcher.sigma)
    if matcher.name == "window-softargmax":
        return window_softargmax(similarity, matcher.temperature, matcher.window)
    if matcher.name in ("nn", "bilinear", "mutual"):
        return nearest_cell(similarity)
    raise InputError(f"matcher is '{matcher.name}', which has no rule here")


def _from_best(similarity: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the signed distance, in cells, from each row's best cell to every column ``(N, w)`` and row ``(N, h)``."""
    y, x = np.divmod(first_best(similarity), similarity.shape[2])
    return np.arange(similarity.shape[2]) - x[:, None], np.arange(similarity.shape[1]) - y[:, None]


class GridTarget:
    """A target prepared for the matchers that work on cells.

    Args:
        descriptors: the target's: one, or several whose cosines are multiplied.
        matcher: any but ``dense``.

    Attributes:
        descriptors: as given.
        cells: ``(h, w)``, true where a cell shows a part of the image; only these can be found.
    """

    def __init__(self, descriptors: Sequence[Descriptors], matcher: Matcher) -> None:
        self.descriptors = tuple(descriptors)
        self._matcher = matcher
        self.cells = content_cells(descriptors[0].geometry, descriptors[0].grid)
        lengths = [one.lengths() for one in descriptors]
        self._inverse = [1.0 / np.where(one > 0, one, np.inf) for one in lengths]  # a zero cell's cosine is 0

    def at(self, indices: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """Give the unit vectors ``(N, C)`` of cells named by row-major index, for each of the descriptors."""
        return [one.at(indices) for one in self.descriptors]

    def similarity(self, queries: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Score queries at every cell, ``(N, h, w)``; ``-inf`` at padding.

        Args:
            queries: unit vectors ``(N, C)`` for each of the target's descriptors.
        """
        three = zip(self.descriptors, queries, self._inverse, strict=True)
        cosines = [one.products(query) * inverse for one, query, inverse in three]
        return np.where(self.cells, mean_cosine(cosines, self.descriptors), -np.inf)

    def find(
        self, queries: Sequence[NDArray[np.float64]], margin: bool = True, corners: Corners | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Find where each query matches.

        The score is the cosine at the place found. For a soft matcher that place lies between cells, and the map is
        read there bilinearly. The margin is that of the best cell (`difftap.matching.confidence.cell_margins`); for
        ``bilinear`` it is the weighted mean of the corners' margins.

        Args:
            queries: unit vectors ``(N, C)`` for each of the target's descriptors.
            margin: also compute margins.
            corners: the corners of the points, for ``bilinear``, which matches them instead of the points.

        Returns:
            cells ``(N, 2)``, scores ``(N,)`` and margins ``(N,)``.
        """
        count = len(queries[0])
        found, score, margins = np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan)
        block = max(1, _BLOCK_BYTES // (8 * self.cells.size))
        for start in range(0, count, block):
            part = slice(start, start + block)
            mix = None if corners is None else corners.weights[part]  # (n, 4)
            own = [one[part] for one in queries]
            asked = own if corners is None else [one[4 * start : 4 * (start + block)] for one in corners.vectors]
            similarity = self.similarity(asked)
            cells = mixed(choose_cells(similarity, self._matcher), mix)
            found[part] = cells
            both = zip(own, self.descriptors, strict=True)
            cosines = [np.sum(query * one.read(cells, "bilinear"), axis=1) for query, one in both]
            score[part] = mean_cosine(cosines, self.descriptors)
            if margin:
                margins[part] = mixed(cell_margins(similarity, first_best(similarity)), mix)
        return found, score, margins


@dataclass(frozen=True)
class Corners:
    """The four source cells around each of N points, for the ``bilinear`` matcher.

    Attributes:
        vectors: unit vectors ``(4 N, C)``, point by point, for each of the source's descriptors.
        weights: ``(N, 4)``, the weights of their matches; each row sums to 1.
    """

    vectors: list[NDArray[np.float64]]
    weights: NDArray[np.float64]

    @classmethod
    def around(cls, descriptors: Sequence[Descriptors], cells: NDArray[np.float64]) -> Corners:
        """Read the corners of fractional cells ``(N, 2)``."""
        indices, weights = corner_cells(cells, content_cells(descriptors[0].geometry, descriptors[0].grid))
        return cls([one.at(indices.ravel()) for one in descriptors], weights)


def mixed(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Take the weighted mean of what was found for corners, ``(4 N, ...)``, by weights ``(N, 4)``.

    Without weights the values are returned as they are.
    """
    if weights is None:
        return values
    shaped = values.reshape(*weights.shape, *values.shape[1:])  # (N, 4, ...)
    spread = weights.reshape(*weights.shape, *(1,) * (shaped.ndim - 2))
    # A corner of weight 0 may have found NaN (a margin that does not exist), and 0 * NaN would spoil the mean.
    total: NDArray[np.float64] = np.where(spread > 0, spread * shaped, 0.0).sum(axis=1)
    return total
