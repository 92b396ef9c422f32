"""Lengths of interpolated vectors, from Gram products of the cells.

The vector at a pixel is ``sum_i u_i T_i`` over the cells it reads, so its squared length is the quadratic form
``sum_ij u_i u_j <T_i, T_j>``. Both interpolations being separable, the weights of a pair of cells ``(dy, dx)`` apart
are a product of one factor per axis, and the whole image of lengths follows from a few small matrix products.

Axis letters: C channels; W H image pixels; w h cells; Y X cells of one run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.matching.halves import sum_in_halves
from difftap.matching.interpolate import VANISHING, Run

__all__ = ["DOUBTFUL", "gram_products", "inverse_norms"]

DOUBTFUL = 1e-2
"""Vectors shorter than this share of what their cells could give are read directly.

There the quadratic form has lost digits to cancellation, and rounding would decide between pixels that tie.
"""

_BLOCK_VALUES = 1 << 17  # float64 channels converted at once: they stay in a core's cache for all offsets


def gram_products(data: NDArray[np.floating], reach: int) -> NDArray[np.float64]:
    """Dot products of cells with their neighbours, each pair of different cells counted twice.

    Half of the offsets are enough, the products being symmetric; the other half stays zero.

    Args:
        data: ``(C, h, w)``.
        reach: farthest offset, in cells.

    Returns:
        ``(reach + 1, h, 2 reach + 1, w)``; the entry ``[dy, y, reach + dx, x]`` is of the cells ``(y, x)`` and
        ``(y + dy, x + dx)``, zero where the second lies outside the map.
    """
    channels, height, width = data.shape
    size = height * width
    across, down = min(reach, width - 1), min(reach, height - 1)
    offsets = [(dy, dx) for dy in range(down + 1) for dx in range(-across, across + 1) if dy > 0 or dx >= 0]
    cells = data.reshape(channels, size)
    block = max(1, _BLOCK_VALUES // size)

    def products(some: range) -> NDArray[np.float64]:
        sums = np.zeros((len(offsets), size))
        for start in some[::block]:
            part = cells[start : min(start + block, some.stop)].astype(np.float64)
            for k, (dy, dx) in enumerate(offsets):
                step = dy * width + dx  # rows follow each other: an offset is one shift; what wraps round is cut below
                sums[k, : size - step] += np.einsum("cp,cp->p", part[:, : size - step], part[:, step:])
        return sums

    sums = sum_in_halves(channels, products)
    grams = np.zeros((reach + 1, height, 2 * reach + 1, width))
    for k, (dy, dx) in enumerate(offsets):
        inside = slice(max(0, -dx), width - max(0, dx))
        grams[dy, :, reach + dx, inside] = sums[k].reshape(height, width)[:, inside] * (1 if dy == dx == 0 else 2)
    return grams


def inverse_norms(
    data: NDArray[np.floating], down: list[Run], across: list[Run], interpolation: str
) -> NDArray[np.float64]:
    """One over the length of the interpolated vector at every pixel, ``(H, W)``; 0 where it vanishes.

    Args:
        data: ``(C, h, w)``.
        down: how pixel rows read rows of cells.
        across: how pixel columns read columns of cells.
        interpolation: ``bilinear`` or ``bicubic``.

    Vectors below `DOUBTFUL`, which real features hardly have, are interpolated one by one.

    Raises:
        InputError: the map holds NaN or infinity.
    """
    reach = 1 if interpolation == "bilinear" else 3  # a pixel reads cells up to this far apart
    grams = gram_products(data, reach)
    lengths = np.sqrt(grams[0, :, reach, :])  # (h, w)
    if not np.isfinite(lengths).all():
        raise InputError("the feature map holds NaN or infinity; features must be finite, so extract them again")
    height = lengths.shape[0]
    rows = np.empty((reach + 1, height, across[-1].stop))  # quadratic in the columns already, (dy, h, W)
    longest = np.empty((height, across[-1].stop))
    for run in across:
        here = slice(run.start, run.stop)
        pairs = _pair_weights(run.weights, range(-reach, reach + 1))  # (dx, X, run)
        products = grams[..., run.low : run.high].reshape((reach + 1) * height, -1)  # (dy h, dx X)
        rows[..., here] = (products @ pairs.reshape(products.shape[1], -1)).reshape(reach + 1, height, -1)
        longest[:, here] = lengths[:, run.low : run.high] @ np.abs(run.weights.T)
    owner = np.repeat(np.arange(len(across)), [run.stop - run.start for run in across])  # (W,), the run of a column
    inverse = np.zeros((down[-1].stop, across[-1].stop))
    for run in down:
        pairs = _pair_weights(run.weights, range(reach + 1))  # (dy, Y, run)
        below = rows[:, run.low : run.high].reshape(-1, rows.shape[2])  # (dy Y, W)
        squared = pairs.reshape(len(below), -1).T @ below  # (run, W)
        possible = np.abs(run.weights) @ longest[run.low : run.high]  # the length if all cells pointed the same way
        present = squared > np.square(VANISHING * possible)
        for p, x in np.argwhere(present & (squared < np.square(DOUBTFUL * possible))):
            squared[p, x] = _squared_length(data, run, p, across[owner[x]], x)
        np.divide(1.0, np.sqrt(np.maximum(squared, 0.0)), out=inverse[run.start : run.stop], where=present)
    return inverse


def _squared_length(data: NDArray[np.floating], down: Run, row: int, across: Run, column: int) -> float:
    """Squared length of the vector at the run's pixel ``row`` and the image's pixel ``column``, read directly."""
    patch = data[:, down.low : down.high, across.low : across.high].astype(np.float64)
    vector = down.weights[row] @ patch @ across.weights[column - across.start]  # (C,)
    return float(vector @ vector)


def _pair_weights(weights: NDArray[np.float64], offsets: range) -> NDArray[np.float64]:
    """Products of a run's weights with those ``offset`` cells further on: ``(P, X)`` to ``(offsets, X, P)``."""
    cells = weights.shape[1]
    pairs = np.zeros((len(offsets), cells, len(weights)))
    for k, offset in enumerate(offsets):
        first, last = max(0, -offset), cells - max(0, offset)
        if first < last:
            pairs[k, first:last] = (weights[:, first:last] * weights[:, first + offset : last + offset]).T
    return pairs
