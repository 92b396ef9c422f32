"""Reading a feature map between its cells.

Both interpolations are separable, so everything here works with the weights of one axis at a time, and never enlarges a
map. `difftap.coords.Geometry` says where cells lie (the half-pixel rule and the letterbox): it gives the fractional
cell of every pixel. Cells beyond the border repeat the border cells, as in torch's ``F.interpolate``.

Axis letters: N points; P positions along an axis; C channels; W H image pixels; w h cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size

__all__ = [
    "CUBIC_A",
    "SMALL",
    "VANISHING",
    "AxisRun",
    "axis_matrix",
    "axis_runs",
    "axis_taps",
    "pixel_cells",
    "sample",
    "unit",
]

CUBIC_A = -0.75
"""Keys' cubic convolution parameter; torch and OpenCV use -0.75, Pillow -0.5."""

VANISHING = 1e-6
"""Interpolated vectors count as zero if they are shorter than this share of the length they have without cancellation.

Between two opposite cells the vectors cancel. What is left there is rounding, and its cosine would be noise.
"""

SMALL = 1 << 18
"""Number of multiplications up to which OpenBLAS computes a matrix product on the calling thread.

Matching consists of many small products. Sharing them among threads gains nothing, and on a busy machine each product
waits for a thread that is not scheduled: measured at 200 times slower on two busy cores. So products are cut to stay
below this size.
"""


@dataclass(frozen=True)
class AxisRun:
    """Neighbouring pixels along one axis that read the same cells.

    Attributes:
        start: first pixel.
        stop: one past the last pixel.
        low: first cell.
        high: one past the last cell.
        weights: ``(stop - start, high - low)``; rows sum to 1.
    """

    start: int
    stop: int
    low: int
    high: int
    weights: NDArray[np.float64]


def axis_taps(
    positions: NDArray[np.float64], cells: int, interpolation: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tell which cells each position reads along one axis, and with which weights.

    Args:
        positions: ``(P,)`` fractional cell coordinates.
        cells: number of cells along the axis.
        interpolation: ``bilinear`` (K = 2 cells) or ``bicubic`` (K = 4 cells; Keys 1981 with a = -0.75).

    Returns:
        indices ``(P, K)``, clamped to the axis, and weights ``(P, K)`` that sum to 1.
    """
    # A pixel on a cell's centre must read that cell only. Rounding would add a trace of the next cell, and if the cell
    # itself is zero, that trace alone would decide the cosine.
    centres = np.rint(positions)
    positions = np.where(np.abs(positions - centres) < 1e-9, centres, positions)
    base = np.floor(positions)
    t = positions - base
    if interpolation == "bilinear":
        weights = np.stack([1 - t, t], axis=-1)
        first = 0
    else:
        weights = np.stack([_far(t + 1), _near(t), _near(1 - t), _far(2 - t)], axis=-1)
        first = -1
    indices = base.astype(np.int64)[:, None] + np.arange(first, first + weights.shape[-1])
    return np.clip(indices, 0, cells - 1), weights  # clamping the index repeats the border cell


def _near(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evaluate the cubic convolution kernel at distances 0 to 1."""
    return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1


def _far(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evaluate the cubic convolution kernel at distances 1 to 2."""
    return ((CUBIC_A * x - 5 * CUBIC_A) * x + 8 * CUBIC_A) * x - 4 * CUBIC_A


def axis_matrix(positions: NDArray[np.float64], cells: int, interpolation: str) -> NDArray[np.float64]:
    """Give the weights of `axis_taps` as a matrix ``(P, cells)`` to multiply the cells of one axis with."""
    indices, weights = axis_taps(positions, cells, interpolation)
    matrix = np.zeros((len(positions), cells))
    rows = np.arange(len(positions))
    for k in range(indices.shape[1]):  # one tap at a time: at the border, clamped taps name one cell and must add up
        matrix[rows, indices[:, k]] += weights[:, k]
    return matrix


def axis_runs(positions: NDArray[np.float64], cells: int, interpolation: str, longest: int) -> list[AxisRun]:
    """Give the weights of `axis_taps` in runs: at most ``longest`` neighbouring positions that read the same cells.

    Args:
        positions: ``(P,)`` fractional cells, ascending.
        cells: number of cells along the axis.
        interpolation: ``bilinear`` or ``bicubic``.
        longest: most positions in a run.
    """
    indices, weights = axis_taps(positions, cells, interpolation)
    changes = np.flatnonzero((np.diff(indices, axis=0) != 0).any(axis=1)) + 1
    runs = []
    for first, last in zip([0, *changes], [*changes, len(positions)], strict=True):
        low, high = int(indices[first, 0]), int(indices[first, -1]) + 1
        for start in range(int(first), int(last), longest):
            stop = min(start + longest, int(last))
            local = np.zeros((stop - start, high - low))
            for k in range(indices.shape[1]):  # one tap at a time, as in `axis_matrix`
                local[:, indices[first, k] - low] += weights[start:stop, k]
            runs.append(AxisRun(start, stop, low, high, local))
    return runs


def pixel_cells(geometry: Geometry, grid: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the fractional cell columns ``(W,)`` and rows ``(H,)`` of every pixel column and row of the image."""
    width, height = geometry.image
    # A column's cell does not depend on the row, so the pixels of the diagonal give both axes at once.
    diagonal = np.arange(max(width, height), dtype=np.float64)
    cells = geometry.to_cells(np.stack([diagonal, diagonal], axis=1), grid)
    return cells[:width, 0], cells[:height, 1]


def sample(
    pick: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.floating]],
    grid: Size,
    cells: NDArray[np.float64],
    interpolation: str,
) -> NDArray[np.float64]:
    """Interpolate between the cells of a map ``(C, h, w)``; vectors that nearly cancel become zero (`VANISHING`).

    Args:
        pick: gives the vectors ``(N, C)`` of whole cells, from their columns ``(N,)`` and rows ``(N,)``.
        grid: ``(w, h)`` of the map.
        cells: ``(N, 2)``, fractional.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        vectors ``(N, C)``.
    """
    columns, across = axis_taps(cells[:, 0], grid[0], interpolation)
    rows, down = axis_taps(cells[:, 1], grid[1], interpolation)
    vectors, possible = np.zeros((1, 1)), np.zeros(len(cells))
    for j in range(rows.shape[1]):
        for i in range(columns.shape[1]):
            part = (down[:, j] * across[:, i])[:, None] * pick(columns[:, i], rows[:, j])
            vectors = vectors + part if j == i == 0 else np.add(vectors, part, out=vectors)
            possible += np.sqrt(np.einsum("nc,nc->n", part, part))  # the length if all parts pointed the same way
    length = np.sqrt(np.einsum("nc,nc->n", vectors, vectors))
    vectors[length <= VANISHING * possible] = 0.0
    return vectors


def unit(vectors: NDArray[np.floating], axis: int = -1) -> NDArray[np.float64]:
    """Scale vectors to length 1 along an axis; a zero vector stays zero, so that its cosines are 0."""
    values = np.asarray(vectors, np.float64)
    length = np.sqrt(np.sum(np.square(values), axis=axis, keepdims=True))
    return values / np.where(length > 0, length, 1.0)
