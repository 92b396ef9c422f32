"""Matchers that choose among the target's cells: nearest neighbour and the soft-argmax family.

All take cosines ``(N, h, w)`` with ``-inf`` at cells that do not count (letterbox padding) and return fractional cells
``(N, 2)`` as ``(x, y)``. `GridTarget` brings them to pixels by the geometry's half-pixel rule. SD4Match scales with
aligned corners instead, ``x_f = x (w - 1) / (W - 1)``; that belongs to its protocol, and a benchmark that follows it
converts its own coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.confidence import cell_margins
from difftap.matching.dense import TIE, Peaks, project
from difftap.matching.interpolate import axis_taps, sample, unit
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

_BLOCK_BYTES = 1 << 24


def content_cells(geometry: Geometry, grid: Size) -> NDArray[np.bool_]:
    """Which cells ``(h, w)`` of a map show some of the image rather than padding alone."""
    x0, y0, x1, y1 = geometry.content
    width, height = grid
    column, row = np.arange(width) * (geometry.input[0] / width), np.arange(height) * (geometry.input[1] / height)
    # A cell must show more than rounding's worth of the image, measured in input pixels.
    columns = (column < x1 - 1e-6) & (column + geometry.input[0] / width > x0 + 1e-6)
    rows = (row < y1 - 1e-6) & (row + geometry.input[1] / height > y0 + 1e-6)
    return rows[:, None] & columns


def clip_to_image(points: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """Points ``(N, 2)`` moved onto the pixel centres' range, ``[0, W - 1] x [0, H - 1]``; NaN stays.

    The centre of a cell at the border can lie outside: under a letterbox, or where the grid is finer than the image.
    """
    return np.clip(points, 0.0, np.array(size, np.float64) - 1.0)


def first_best(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """Row-major index ``(N,)`` of the best of each row ``(N, ...)``; of cosines within `TIE`, the first."""
    flat = similarity.reshape(len(similarity), math.prod(similarity.shape[1:]))  # -1 would fail on no rows
    best: NDArray[np.int64] = np.argmax(flat >= flat.max(axis=1, keepdims=True) - TIE, axis=1)
    return best


def nearest_cell(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """``nn``: the best cell, ``(N, h, w)`` to ``(N, 2)``."""
    y, x = np.divmod(first_best(similarity), similarity.shape[2])
    return np.stack([x, y], axis=1).astype(np.float64)


def softargmax(similarity: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """``softargmax``: the mean cell under a softmax over all cosines / temperature (SD4Match: 0.04)."""
    _, height, width = similarity.shape
    peak = np.max(similarity, axis=(1, 2), keepdims=True)
    weights = np.exp((similarity - peak) / temperature)  # exp(-inf) is 0: padding has no say
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    x = weights.sum(axis=1) @ np.arange(width)
    y = weights.sum(axis=2) @ np.arange(height)
    return np.stack([x, y], axis=1)


def kernel_softargmax(similarity: NDArray[np.float64], temperature: float, sigma: float) -> NDArray[np.float64]:
    """``kernel-softargmax``: cosines times a Gaussian about the best cell, then `softargmax` (SD4Match, SFNet).

    Args:
        similarity: ``(N, h, w)`` cosines.
        temperature: of the softmax (SD4Match: 0.04).
        sigma: of the Gaussian, in cells (SD4Match: 7).
    """
    right, down = _from_best(similarity)
    kernel = np.exp(-(np.square(down)[:, :, None] + np.square(right)[:, None, :]) / (2 * sigma**2))  # (N, h, w)
    # Far from the peak the kernel underflows to 0, and 0 * -inf would be NaN: padding is put back afterwards.
    present = similarity > -np.inf
    return softargmax(np.where(present, np.where(present, similarity, 0.0) * kernel, -np.inf), temperature)


def window_softargmax(similarity: NDArray[np.float64], temperature: float, window: int) -> NDArray[np.float64]:
    """``window-softargmax``: cosines outside a window about the best cell set to 0, then `softargmax` (GeoAware-SC).

    Zero, not minus infinity: cells outside keep a small pull towards the map's centre, as in that system.

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
    """The four cells around fractional cells ``(N, 2)``, for SD4Match's ``bilinear`` matcher.

    Args:
        cells: on the source's map.
        content: ``(h, w)``, which of its cells show some of the image; others are replaced by the nearest that do.

    Returns:
        row-major indices ``(N, 4)`` and bilinear weights ``(N, 4)`` that sum to 1.
    """
    columns, rows = np.flatnonzero(content.any(axis=0)), np.flatnonzero(content.any(axis=1))
    x, across = axis_taps(np.clip(cells[:, 0], columns[0], columns[-1]), content.shape[1], "bilinear")  # (N, 2) each
    y, down = axis_taps(np.clip(cells[:, 1], rows[0], rows[-1]), content.shape[0], "bilinear")
    indices = y[:, :, None] * content.shape[1] + x[:, None, :]  # (N, 2, 2)
    # A keypoint on the last cell reads one beyond it with weight 0; clamped into the image, it has no say.
    return indices.reshape(-1, 4), (down[:, :, None] * across[:, None, :]).reshape(-1, 4)


def choose_cells(similarity: NDArray[np.float64], matcher: Matcher) -> NDArray[np.float64]:
    """The place each row of cosines ``(N, h, w)`` matches, in cells ``(N, 2)``; a row is a corner for ``bilinear``."""
    if matcher.name == "softargmax":
        return softargmax(similarity, matcher.temperature)
    if matcher.name == "kernel-softargmax":
        return kernel_softargmax(similarity, matcher.temperature, matcher.sigma)
    if matcher.name == "window-softargmax":
        return window_softargmax(similarity, matcher.temperature, matcher.window)
    return nearest_cell(similarity)


def _from_best(similarity: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Signed cells from each row's best cell to every column ``(N, w)`` and row ``(N, h)``."""
    y, x = np.divmod(first_best(similarity), similarity.shape[2])
    return np.arange(similarity.shape[2]) - x[:, None], np.arange(similarity.shape[1]) - y[:, None]


class GridTarget:
    """A target made ready for the matchers that work on cells.

    Attributes:
        features: the target's map.
        matcher: any but ``dense``.
        cells: ``(h, w)``, true where a cell shows some of the image; only these can be found.
    """

    def __init__(self, features: FeatureMap, matcher: Matcher) -> None:
        self.features = features
        self.matcher = matcher
        self.cells = content_cells(features.geometry, features.grid)
        lengths = np.sqrt(np.einsum("cyx,cyx->yx", features.data, features.data, dtype=np.float64))
        if not np.isfinite(lengths).all():
            raise InputError("the feature map holds NaN or infinity; features must be finite, so extract them again")
        self._inverse = 1.0 / np.where(lengths > 0, lengths, np.inf)  # a zero cell's cosine is 0

    def similarity(self, descriptors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Cosines ``(N, h, w)`` of descriptors ``(N, C)`` with the cells; ``-inf`` at padding."""
        cosines = project(unit(descriptors), self.features.data) * self._inverse
        return np.where(self.cells, np.clip(cosines, -1.0, 1.0), -np.inf)

    def find(self, descriptors: NDArray[np.floating], margin: bool = True, corners: Corners | None = None) -> Peaks:
        """The place each descriptor ``(N, C)`` matches, in pixels clipped into the image; see `find_cells`."""
        cells, score, margins = self.find_cells(descriptors, margin, corners)
        return Peaks(clip_to_image(self.features.to_pixels(cells), self.features.image_size), score, margins)

    def find_cells(
        self, descriptors: NDArray[np.floating], margin: bool = True, corners: Corners | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The place each descriptor ``(N, C)`` matches, in cells ``(N, 2)``, with scores and margins ``(N,)``.

        The score is the cosine at the place found, which for a soft matcher lies between cells, where the map is read
        bilinearly. The margin is that of the best cell over the best one farther than `RADIUS_CELLS`; for ``bilinear``
        the corners' margins, mixed as their places are.

        Args:
            descriptors: of the points.
            margin: also compute margins.
            corners: for ``bilinear``, which matches them in the points' stead.
        """
        count = len(descriptors)
        found, score, margins = np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan)
        block = max(1, _BLOCK_BYTES // (8 * self.cells.size))
        for start in range(0, count, block):
            part = slice(start, start + block)
            mix = None if corners is None else corners.weights[part]  # (n, 4)
            asked = descriptors[part] if corners is None else corners.vectors[4 * start : 4 * (start + block)]
            similarity = self.similarity(asked)
            cells = mixed(choose_cells(similarity, self.matcher), mix)
            found[part] = cells
            at = unit(sample(self.features.data, cells, "bilinear"))
            score[part] = np.clip(np.sum(unit(descriptors[part]) * at, axis=1), -1.0, 1.0)
            if margin:
                margins[part] = mixed(cell_margins(similarity, first_best(similarity)), mix)
        return found, score, margins


@dataclass(frozen=True)
class Corners:
    """The four source cells around each of N points, for the ``bilinear`` matcher.

    Attributes:
        vectors: ``(4 N, C)``, point by point.
        weights: ``(N, 4)``, by which their matches are mixed; each row sums to 1.
    """

    vectors: NDArray[np.floating]
    weights: NDArray[np.float64]

    @classmethod
    def around(cls, features: FeatureMap, cells: NDArray[np.float64]) -> Corners:
        """The corners of fractional cells ``(N, 2)`` of a map."""
        indices, weights = corner_cells(cells, content_cells(features.geometry, features.grid))
        return cls(features.data.reshape(features.channels, -1)[:, indices.ravel()].T, weights)


def mixed(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """What was found for corners, ``(4 N, ...)``, mixed by weights ``(N, 4)``; as it is without weights.

    A corner of no weight has no say, whatever it found.
    """
    if weights is None:
        return values
    shaped = values.reshape(*weights.shape, *values.shape[1:])  # (N, 4, ...)
    spread = weights.reshape(*weights.shape, *(1,) * (shaped.ndim - 2))
    total: NDArray[np.float64] = np.where(spread > 0, spread * shaped, 0.0).sum(axis=1)
    return total
