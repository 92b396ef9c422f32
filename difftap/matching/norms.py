"""Sums over channels: products of cells with queries and with one another, and the lengths computed from these.

The vector at a pixel is ``sum_i u_i T_i`` over the cells it reads, so its squared length is the quadratic form
``sum_ij u_i u_j <T_i, T_j>``. Both interpolations are separable: the weight of a pair of cells that lie ``(dy, dx)``
apart is a product of one factor per axis. So the lengths at all pixels follow from a few small matrix products.

Dense matching spends most of its time on passes over the channels of a map, which numpy runs on one core. Here two
threads share them. The split is the same on every machine, so that sums are rounded in the same way everywhere.

Axis letters: N queries; C channels; W H image pixels; w h cells; Y X cells of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.matching.interpolate import SMALL, VANISHING, AxisRun

__all__ = ["DOUBTFUL", "check_finite", "gram_products", "inverse_norms", "project", "scale_grams", "sum_in_halves"]

DOUBTFUL = 1e-2
"""Vectors shorter than this share of their length without cancellation are interpolated and measured directly.

There the quadratic form has lost digits to cancellation, and its rounding would decide between pixels that tie.
"""

_WORTH = 256  # with fewer channels, a second thread costs more than it saves
_READ_AT_ONCE = 256  # number of doubtful vectors in memory at once
_BLOCK_VALUES = 1 << 17  # values converted to float64 at once, 1 MiB: they stay in a core's cache for all offsets


def sum_in_halves(channels: int, work: Callable[[range], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sum ``work`` over the channels, as two halves in two threads where that is faster.

    Args:
        channels: C.
        work: computes the sum over a range of channels.
    """
    if channels < _WORTH:
        return work(range(channels))
    with ThreadPoolExecutor(1) as other:
        second = other.submit(work, range(channels // 2, channels))
        first = work(range(channels // 2))
        return first + second.result()


def project(queries: NDArray[np.float64], data: NDArray[np.floating]) -> NDArray[np.float64]:
    """Multiply queries ``(N, C)`` with every cell of a map ``(C, h, w)``: ``(N, h, w)`` in float64."""
    channels, height, width = data.shape
    size = height * width
    cells = data.reshape(channels, size)

    def over(some: range) -> NDArray[np.float64]:
        products = np.zeros((len(queries), size))
        for first in range(0, len(queries), 64):
            here = slice(first, first + 64)
            count = len(queries[here])
            # Products stay below `SMALL`: a few channels over all cells or, with many queries, 64 channels over a few.
            block, step = SMALL // (count * size), size
            if block < 8:
                block = 64
                step = max(1, SMALL // (count * block))
            for start in some[::block]:  # in blocks: a float64 copy of the whole map would take twice its memory
                stop = min(start + block, some.stop)
                part = cells[start:stop].astype(np.float64)
                for low in range(0, size, step):
                    products[here, low : low + step] += queries[here, start:stop] @ part[:, low : low + step]
        return products

    return sum_in_halves(channels, over).reshape(len(queries), height, width)


def gram_products(data: NDArray[np.floating], reach: int) -> NDArray[np.float64]:
    """Multiply cells with their neighbours; a pair of different cells counts twice.

    The products are symmetric, so half of the offsets are computed; the other half stays zero.

    Args:
        data: ``(C, h, w)``.
        reach: farthest offset, in cells.

    Returns:
        ``(reach + 1, h, 2 reach + 1, w)``. Entry ``[dy, y, reach + dx, x]`` belongs to the cells ``(y, x)`` and
        ``(y + dy, x + dx)``; it is zero if the second lies outside the map.
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
                # Rows follow one another in memory, so an offset is a shift of the flat array. Products that wrap
                # around the border of a row are cut off below.
                step = dy * width + dx
                sums[k, : size - step] += np.einsum("cp,cp->p", part[:, : size - step], part[:, step:])
        return sums

    sums = sum_in_halves(channels, products)
    grams = np.zeros((reach + 1, height, 2 * reach + 1, width))
    for k, (dy, dx) in enumerate(offsets):
        inside = slice(max(0, -dx), width - max(0, dx))
        grams[dy, :, reach + dx, inside] = sums[k].reshape(height, width)[:, inside] * (1 if dy == dx == 0 else 2)
    return grams


def scale_grams(grams: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn the `gram_products` of cells into those of the cells multiplied by ``scale`` ``(h, w)``, in place."""
    reach = len(grams) - 1
    height, width = scale.shape
    padded = np.zeros((height + reach, width + 2 * reach))
    padded[:height, reach : reach + width] = scale
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            grams[dy, :, reach + dx, :] *= scale * padded[dy : dy + height, reach + dx : reach + dx + width]
    return grams


def inverse_norms(
    grams: NDArray[np.float64],
    down: list[AxisRun],
    across: list[AxisRun],
    read: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Give one over the length of the interpolated vector at every pixel, ``(H, W)``; 0 where the vector vanishes.

    Args:
        grams: the cells' `gram_products`, with a reach of 1 for bilinear and 3 for bicubic.
        down: how pixel rows read rows of cells.
        across: how pixel columns read columns of cells.
        read: gives the vectors ``(M, C)`` at pixels, from their rows ``(M,)`` and columns ``(M,)``. It is called for
            vectors below `DOUBTFUL`, which real features hardly have.

    Raises:
        InputError: the map holds NaN or infinity.
    """
    reach = len(grams) - 1
    lengths = np.sqrt(grams[0, :, reach, :])  # (h, w)
    check_finite(lengths)
    height = lengths.shape[0]
    # The quadratic form, one axis after the other: first over the cells that a pixel column reads, (dy, h, W).
    rows = np.empty((reach + 1, height, across[-1].stop))
    longest = np.empty((height, across[-1].stop))
    for run in across:
        here = slice(run.start, run.stop)
        pairs = _pair_weights(run.weights, range(-reach, reach + 1))  # (dx, X, run)
        products = grams[..., run.low : run.high].reshape((reach + 1) * height, -1)  # (dy h, dx X)
        rows[..., here] = (products @ pairs.reshape(products.shape[1], -1)).reshape(reach + 1, height, -1)
        longest[:, here] = lengths[:, run.low : run.high] @ np.abs(run.weights.T)
    inverse = np.zeros((down[-1].stop, across[-1].stop))
    for run in down:
        pairs = _pair_weights(run.weights, range(reach + 1))  # (dy, Y, run)
        below = rows[:, run.low : run.high].reshape(-1, rows.shape[2])  # (dy Y, W)
        squared = pairs.reshape(len(below), -1).T @ below  # (run, W)
        possible = np.abs(run.weights) @ longest[run.low : run.high]  # the length if all cells pointed the same way
        present = squared > np.square(VANISHING * possible)
        y, x = np.nonzero(present & (squared < np.square(DOUBTFUL * possible)))
        for start in range(0, len(y), _READ_AT_ONCE):
            some = slice(start, start + _READ_AT_ONCE)
            vectors = read(run.start + y[some], x[some])
            squared[y[some], x[some]] = np.einsum("nc,nc->n", vectors, vectors)
        # A vector that was read directly may turn out to be zero, hence ``squared > 0``.
        np.divide(
            1.0, np.sqrt(np.maximum(squared, 0.0)), out=inverse[run.start : run.stop], where=present & (squared > 0)
        )
    return inverse


def check_finite(lengths: NDArray[np.float64]) -> None:
    """Refuse a map, by the lengths of its cells, if it is not finite.

    Raises:
        InputError: the map holds NaN or infinity.
    """
    if not np.isfinite(lengths).all():
        raise InputError("the feature map holds NaN or infinity; features must be finite, so extract them again")


def _pair_weights(weights: NDArray[np.float64], offsets: range) -> NDArray[np.float64]:
    """Multiply a run's weights ``(P, X)`` with those ``offset`` cells further on, for each: ``(offsets, X, P)``."""
    cells = weights.shape[1]
    pairs = np.zeros((len(offsets), cells, len(weights)))
    for k, offset in enumerate(offsets):
        first, last = max(0, -offset), cells - max(0, offset)
        if first < last:
            pairs[k, first:last] = (weights[:, first:last] * weights[:, first + offset : last + offset]).T
    return pairs
