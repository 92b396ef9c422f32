"""Distance correlation of all pairs by matrix products.

For a vector x of D channels, the samples, let A be the D x D matrix of ``|x_k - x_l|`` less its row's and its column's
mean, plus the mean of all (Szekely, Rizzo and Bakirov 2007, eq. 2.8). Then ``dCov^2(x, y) = <A, B> / D^2`` and
``dCor^2(x, y) = <A, B> / (|A| |B|)``, the cosine of two long vectors. A is symmetric, so its upper triangle will do,
with all but the diagonal weighted by the square root of 2. The long vectors never exist as a whole: some hundreds of
thousands of channel pairs at a time are written and multiplied, and the products add up.

Axis letters: N, M vectors; D channels; K channel pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Centred", "squared_correlations"]

_DOUBTFUL = 1e-4
"""float32 leaves an error of some 1e-6 in a square: below this one, the root would be off by more than 5e-5."""

_CACHED = 1 << 16  # numbers worked on at once, to stay in the processor's cache


@dataclass(frozen=True)
class Centred:
    """Vectors made ready for the product: all that is needed to write a row of A.

    Attributes:
        values: float64 ``(N, D)``.
        means: float64 ``(N, D)``, of the absolute differences of each channel to all, less half the mean of all.
    """

    values: NDArray[np.float64]
    means: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.float64]) -> Centred:
        """Prepare ``(N, D)`` vectors of similar length; dCor knows no shift and no scale."""
        channels = vectors.shape[1]
        order = np.argsort(vectors, axis=1)
        ordered = np.take_along_axis(vectors, order, axis=1)
        below = np.cumsum(ordered, axis=1)  # of the k-th smallest: the sum of those up to it
        rank = np.arange(1, channels + 1)
        sums = (2 * rank - channels) * ordered - 2 * below + below[:, -1:]
        means = np.empty_like(vectors)
        np.put_along_axis(means, order, sums / channels, axis=1)
        means -= means.mean(axis=1, keepdims=True) / 2.0
        return cls(vectors, means)


def squared_correlations(
    x: Centred, y: Centred | None, block_bytes: int, xp: Any = np, where: str = "cpu"
) -> NDArray[np.float64]:
    """Squared distance correlations ``(N, M)``, 0 where a vector is constant; ``y`` is None for ``x`` itself.

    Args:
        x: the rows' vectors.
        y: the columns' vectors.
        block_bytes: for the long vectors' parts; at least one row of A is written at once.
        xp: numpy, or torch.
        where: torch's name of the device.
    """
    squares = _correlations(x, y, block_bytes, np.float32, xp, where)
    if ((squares < _DOUBTFUL) & (squares != 0)).any():
        squares = _correlations(x, y, block_bytes, np.float64, xp, where)
    return squares


def _correlations(
    x: Centred, y: Centred | None, block_bytes: int, dtype: type, xp: Any, where: str
) -> NDArray[np.float64]:
    products, ours, theirs = _products(x, y, block_bytes, dtype, xp, where)
    scale = np.sqrt(ours[:, None] * theirs)
    alike = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.clip(alike, 0.0, 1.0)


def _products(
    x: Centred, y: Centred | None, block_bytes: int, dtype: type, xp: Any, where: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``<A, B>`` of every pair ``(N, M)``, and the squared lengths ``(N,)`` and ``(M,)``."""
    count, channels = x.values.shape
    sides = [_Side(x, dtype, xp, where)] if y is None else [_Side(one, dtype, xp, where) for one in (x, y)]
    total = np.zeros((count, count if y is None else len(y.values)))
    lengths = [np.zeros(side.count) for side in sides]
    width = block_bytes // (np.dtype(dtype).itemsize * sum(side.count for side in sides))
    for start, stop in _strips(channels, max(channels, width)):
        written = [side.write(start, stop) for side in sides]
        # One array times itself: BLAS then makes half of the product only.
        total += _host(written[0] @ written[-1].T)
        if y is not None:
            for length, part in zip(lengths, written, strict=True):
                length += _host((part * part).sum(1))
    if y is None:
        lengths = [np.diag(total).copy()]
    return total, lengths[0], lengths[-1]


def _strips(channels: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows of the upper triangle, from and to, of at most ``width`` channel pairs together."""
    start = pairs = 0
    for row in range(channels):
        if pairs + channels - row > width:
            yield start, row
            start, pairs = row, 0
        pairs += channels - row
    yield start, channels


class _Side:
    """The rows' or the columns' vectors on their device, and room for a part of their long vectors."""

    def __init__(self, centred: Centred, dtype: type, xp: Any, where: str) -> None:
        self._xp = xp
        self.count = len(centred.values)
        self._values, self._means = (self._place(one.astype(dtype), where) for one in (centred.values, centred.means))
        self._room: Any = None

    def _place(self, array: NDArray[Any], where: str) -> Any:
        return array if self._xp is np else self._xp.from_numpy(array).to(where)

    def write(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of all vectors' upper triangles, ``(N, K)``."""
        channels = self._values.shape[1]
        room = self._take(sum(channels - row for row in range(start, stop)))
        step = max(1, _CACHED // channels) if self._xp is np else self.count
        for low in range(0, self.count, step):
            some, place = slice(low, low + step), 0
            for row in range(start, stop):
                self._fill(room[some, place : place + channels - row], some, row)
                place += channels - row
        return room

    def _take(self, width: int) -> Any:
        """Room for ``(N, width)``; that of the last time where it fits."""
        if self._room is None or self._room.shape[1] < width:
            self._room = None  # freed before the larger one is made
            shape, kind = (self.count, width), self._values.dtype
            if self._xp is np:
                self._room = np.empty(shape, kind)
            else:
                self._room = self._xp.empty(shape, dtype=kind, device=self._values.device)
        return self._room[:, :width]

    def _fill(self, out: Any, some: slice, row: int) -> None:
        """One row of some vectors' upper triangles."""
        xp, values, means = self._xp, self._values[some], self._means[some]
        xp.subtract(values[:, row:], values[:, row : row + 1], out=out)
        xp.abs(out, out=out)
        out -= means[:, row:]
        out -= means[:, row : row + 1]
        out[:, 0] *= 0.5**0.5  # the diagonal stands once in A, all else twice


def _host(array: Any) -> NDArray[np.float64]:
    moved = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return np.asarray(moved, np.float64)
