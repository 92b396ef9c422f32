"""Compute the distances of all pairs of vectors, in blocks of bounded memory, on the CPU or a GPU.

=============  =============================================================  ==========
metric         distance of x and y                                            range
=============  =============================================================  ==========
euclidean      length of x - y                                                0 and more
manhattan      sum of the absolute values of x - y                            0 and more
cosine         1 - cosine of the angle between x and y                        0 to 2
correlation    1 - Pearson's correlation of x and y                           0 to 2
dcor           1 - distance correlation (Szekely et al. 2007) of x and y      0 to 1
=============  =============================================================  ==========

The channels are the samples of both correlations. A vector of zeros has no cosine, and a constant vector has no
correlation; the value counts as 0 there, so the distance is 1, also to the vector itself.

Distance correlation is computed by matrix products. For a vector x of D channels (the samples), let A be the D x D
matrix of ``|x_k - x_l|``, minus its row's mean and its column's mean, plus the mean of all (Szekely, Rizzo and Bakirov
2007, eq. 2.8). Then ``dCov^2(x, y) = <A, B> / D^2`` and ``dCor^2(x, y) = <A, B> / (|A| |B|)``, the cosine of two long
vectors. A is symmetric, so its upper triangle is enough if the diagonal has the weight 1 and the rest the square root
of 2. The long vectors never exist as a whole: some hundreds of thousands of channel pairs are computed and multiplied
at a time, and the products are added.

Axis letters: N, M vectors; D channels; K channel pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import BackendError, InputError, require

__all__ = ["METRICS", "PreparedVectors", "blocks", "pairwise", "squared_correlations"]


_DOUBTFUL = 1e-4
"""Squares below this are computed again in float64: float32 leaves an error of about 1e-6, and the root of a smaller
square would be off by more than 5e-5."""

_CACHED = 1 << 16  # numbers worked on at once, so that they stay in the processor's cache


@dataclass(frozen=True)
class PreparedVectors:
    """Vectors with what is needed to compute a row of A.

    Attributes:
        values: float64 ``(N, D)``.
        means: float64 ``(N, D)``, the mean absolute difference of each channel to all, minus half of their mean. A is
            then ``|x_k - x_l| - means_k - means_l``.
    """

    values: NDArray[np.float64]
    means: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.float64]) -> PreparedVectors:
        """Prepare vectors ``(N, D)`` of similar length; shifting or scaling a vector does not change its dCor."""
        # The sum of |x_k - x_l| over l, for all k, from one sort: O(D log D) instead of O(D^2).
        channels = vectors.shape[1]
        order = np.argsort(vectors, axis=1)
        ordered = np.take_along_axis(vectors, order, axis=1)
        below = np.cumsum(ordered, axis=1)  # at the k-th smallest: the sum of all up to it
        rank = np.arange(1, channels + 1)
        sums = (2 * rank - channels) * ordered - 2 * below + below[:, -1:]
        means = np.empty_like(vectors)
        np.put_along_axis(means, order, sums / channels, axis=1)
        means -= means.mean(axis=1, keepdims=True) / 2.0
        return cls(vectors, means)


def squared_correlations(
    x: PreparedVectors, y: PreparedVectors | None, block_bytes: int, xp: ModuleType = np, where: str = "cpu"
) -> NDArray[np.float64]:
    """Compute squared distance correlations ``(N, M)``, 0 where a vector is constant.

    Args:
        x: the rows' vectors.
        y: the columns' vectors; None for ``x`` itself.
        block_bytes: bytes for the parts of the long vectors; at least one row of A is computed at once.
        xp: the array library, numpy or torch.
        where: torch's name of the device.
    """
    squares = _correlations(x, y, block_bytes, np.float32, xp, where)
    if ((squares < _DOUBTFUL) & (squares != 0)).any():
        squares = _correlations(x, y, block_bytes, np.float64, xp, where)
    return squares


def _correlations(
    x: PreparedVectors, y: PreparedVectors | None, block_bytes: int, dtype: type, xp: ModuleType, where: str
) -> NDArray[np.float64]:
    products, ours, theirs = _products(x, y, block_bytes, dtype, xp, where)
    scale = np.sqrt(ours[:, None] * theirs)
    alike = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.clip(alike, 0.0, 1.0)


def _products(
    x: PreparedVectors, y: PreparedVectors | None, block_bytes: int, dtype: type, xp: ModuleType, where: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Compute ``<A, B>`` of every pair ``(N, M)``, and the squared lengths ``(N,)`` and ``(M,)``."""
    count, channels = x.values.shape
    sides = [_Side(x, dtype, xp, where)] if y is None else [_Side(one, dtype, xp, where) for one in (x, y)]
    total = np.zeros((count, count if y is None else len(y.values)))
    lengths = [np.zeros(side.count) for side in sides]
    width = block_bytes // (np.dtype(dtype).itemsize * sum(side.count for side in sides))
    for start, stop in _strips(channels, max(channels, width)):
        written = [side.write(start, stop) for side in sides]
        # Without y, this is one array times itself, and BLAS computes half of the product only. Summed in float64:
        # thousands of float32 products would lose digits.
        total += _host(written[0] @ written[-1].T)
        if y is not None:
            for length, part in zip(lengths, written, strict=True):
                length += _host((part * part).sum(1))
    if y is None:
        lengths = [np.diag(total).copy()]
    return total, lengths[0], lengths[-1]


def _strips(channels: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of the upper triangle that hold at most ``width`` channel pairs together."""
    start = pairs = 0
    for row in range(channels):
        if pairs + channels - row > width:
            yield start, row
            start, pairs = row, 0
        pairs += channels - row
    yield start, channels


class _Side:
    """The vectors of the rows or of the columns on their device, and memory for a part of their long vectors.

    Arrays are numpy's or torch's, as ``xp`` says; no type names both.
    """

    def __init__(self, prepared: PreparedVectors, dtype: type, xp: ModuleType, where: str) -> None:
        self._xp = xp
        self.count = len(prepared.values)
        self._values, self._means = (self._place(one.astype(dtype), where) for one in (prepared.values, prepared.means))
        self._room: Any = None

    def _place(self, array: NDArray[np.floating], where: str) -> Any:
        return array if self._xp is np else self._xp.from_numpy(array).to(where)

    def write(self, start: int, stop: int) -> Any:
        """Compute rows ``start`` to ``stop`` of the upper triangle of A for all vectors, ``(N, K)``."""
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
        """Give memory for ``(N, width)`` numbers; use that of the last call if it is large enough."""
        if self._room is None or self._room.shape[1] < width:
            self._room = None  # freed first, so that both never exist at once
            shape, kind = (self.count, width), self._values.dtype
            if self._xp is np:
                self._room = np.empty(shape, kind)
            else:
                self._room = self._xp.empty(shape, dtype=kind, device=self._values.device)
        return self._room[:, :width]

    def _fill(self, out: Any, some: slice, row: int) -> None:
        """Compute one row of the upper triangle of A for some vectors."""
        xp, values, means = self._xp, self._values[some], self._means[some]
        xp.subtract(values[:, row:], values[:, row : row + 1], out=out)
        xp.abs(out, out=out)
        out -= means[:, row:]
        out -= means[:, row : row + 1]
        out[:, 0] *= 0.5**0.5  # the diagonal is in A once, every other entry twice


def _host(array: Any) -> NDArray[np.float64]:
    moved = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return np.asarray(moved, np.float64)


METRICS = ("euclidean", "manhattan", "cosine", "correlation", "dcor")

_DEFAULT_BYTES = 256 << 20

_LARGEST = 4096  # vectors along a tile's side; larger tiles make the products no faster

Vectors = NDArray[np.floating] | NDArray[np.integer]
"""Real numbers ``(N, D)``."""


def pairwise(
    x: Vectors,
    y: Vectors | None = None,
    *,
    metric: str,
    block_bytes: int = _DEFAULT_BYTES,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Compute the distance of every vector of ``x`` to every vector of ``y``.

    Args:
        x: ``(N, D)``, finite; may be memory-mapped.
        y: ``(M, D)``; None for ``x`` itself: the result is then symmetric to the last bit.
        metric: one of `METRICS`.
        block_bytes: bytes of working memory, besides the inputs and the result.
        device: ``cpu`` (numpy) or ``cuda`` (torch).

    Returns:
        float32 ``(N, M)``; smaller is closer.

    Raises:
        InputError: a shape, a value, the metric or the device cannot be used.
        MissingExtraError: ``cuda`` without torch.
        BackendError: ``cuda`` without a GPU.
    """
    table = np.empty((len(x), len(x if y is None else y)), np.float32)
    for rows, columns, block in blocks(x, y, metric=metric, block_bytes=block_bytes, device=device):
        table[rows, columns] = block
    return table


def blocks(
    x: Vectors,
    y: Vectors | None = None,
    *,
    metric: str,
    block_bytes: int = _DEFAULT_BYTES,
    device: str = "cpu",
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield the table of `pairwise` in tiles, for tables that do not fit in memory; the arguments are the same.

    Yields:
        Rows of ``x``, rows of ``y``, and their float32 distances. The tiles cover each place of the table once.
        Without ``y``, a tile off the diagonal is followed by its transpose.
    """
    _check(x, y, metric, block_bytes)
    xp, where = _arrays(device)
    yield from _tiles(x, y, metric, block_bytes, xp, where)


def _tiles(
    x: Vectors, y: Vectors | None, metric: str, block_bytes: int, xp: ModuleType, where: str
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Yield the tiles of `blocks`, computed with numpy or with torch on a device."""
    other = x if y is None else y
    side = _tile_side(x.shape[1], block_bytes, metric)
    across = list(_parts(len(other), side))
    for i, rows in enumerate(_parts(len(x), side)):
        left = _load(x, rows, metric)
        for columns in across[i:] if y is None else across:
            same = y is None and columns == rows
            right = None if same else _load(other, columns, metric)
            block = _distances(left, right, metric, block_bytes, xp, where).astype(np.float32)
            yield rows, columns, block
            if y is None and not same:
                yield columns, rows, block.T
            del right, block  # freed before the next ones are made, so that both never exist at once


def _check(x: Vectors, y: Vectors | None, metric: str, block_bytes: int) -> None:
    if metric not in METRICS:
        raise InputError(f"metric is '{metric}'; allowed: {', '.join(METRICS)}")
    if block_bytes < 1:
        raise InputError(f"block_bytes is {block_bytes}; allowed: a number of bytes above 0")
    for one in (x,) if y is None else (x, y):
        if one.ndim != 2 or one.shape[1] != x.shape[1] or one.shape[1] < 1:
            shapes = f"{x.shape}" if y is None else f"{x.shape} and {y.shape}"
            raise InputError(f"vectors have the shape {shapes}; allowed: (N, D), and (M, D) for the others, D above 0")
        if not (np.issubdtype(one.dtype, np.floating) or np.issubdtype(one.dtype, np.integer)):
            raise InputError(f"vectors hold {one.dtype}; allowed: real numbers")


def _arrays(device: str) -> tuple[ModuleType, str]:
    """Import the array library of a device; give it and its name of the device."""
    if device == "cpu":
        return np, device
    if device.partition(":")[0] != "cuda":
        raise InputError(f"device is '{device}'; allowed: cpu, cuda")
    torch = require("torch", "bench", "distances on a GPU")
    if not torch.cuda.is_available():
        raise BackendError("device is 'cuda', but torch sees no GPU here; use --device cpu")
    return torch, device


def _parts(count: int, side: int) -> Iterator[slice]:
    for start in range(0, count, side):
        yield slice(start, min(start + side, count))


def _tile_side(dimensions: int, block_bytes: int, metric: str) -> int:
    """Compute how many vectors a tile's side may have (at least 1), so that the work fits in the bytes."""
    # In memory at once: the vectors of both sides in float64, as given and prepared (for dcor sorted too); the tile,
    # up to five times in float64 and once in float32. A third of the bytes is left for dcor's long vectors. With side
    # s, table * s^2 + vectors * s = room, whose positive root is returned.
    dcor = metric == "dcor"
    vectors, table = (10 if dcor else 4) * 8 * dimensions, 48
    room = block_bytes * (2 / 3 if dcor else 1)
    return int(np.clip((np.sqrt(vectors**2 + 4 * table * room) - vectors) / (2 * table), 1, _LARGEST))


def _load(vectors: Vectors, rows: slice, metric: str) -> NDArray[Any]:
    """Read some vectors and prepare them for a product: centred, and scaled to length 1, if the metric needs it."""
    part: NDArray[Any] = np.asarray(vectors[rows])
    # float64, because products lose digits where the difference of two vectors is small. Manhattan subtracts before it
    # sums, so float32 is enough there.
    if metric != "manhattan" or part.dtype not in (np.float32, np.float64):
        part = part.astype(np.float64 if metric != "manhattan" else np.float32)
    if not np.isfinite(part).all():
        bad = rows.start + int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
        raise InputError(f"vector {bad} holds NaN or infinity; vectors must be finite, so make them again")
    if metric in ("correlation", "dcor"):
        spread = np.ptp(part, axis=1)
        part = part - part.mean(axis=1, keepdims=True)
        part[spread == 0] = 0.0  # by rounding, the mean of equal numbers may differ from them
    return part if metric in ("euclidean", "manhattan") else _unit(part)


def _unit(part: NDArray[Any]) -> NDArray[Any]:
    """Scale each row to length 1; rows of zeros stay zero."""
    largest = np.abs(part).max(axis=1, keepdims=True)
    part = np.divide(part, largest, out=np.zeros_like(part), where=largest > 0)  # else squares of tiny numbers become 0
    length = np.linalg.norm(part, axis=1, keepdims=True)
    return np.asarray(np.divide(part, length, out=part, where=length > 0))


def _distances(
    left: NDArray[Any], right: NDArray[Any] | None, metric: str, block_bytes: int, xp: ModuleType, where: str
) -> NDArray[np.float64]:
    """Compute one tile; ``right`` is None for the distances of ``left`` among themselves."""
    if metric == "dcor":
        theirs = None if right is None else PreparedVectors.of(right)
        table = 1.0 - np.sqrt(squared_correlations(PreparedVectors.of(left), theirs, block_bytes // 3, xp, where))
    elif metric == "manhattan":
        table = _manhattan(left, left if right is None else right, xp, where)
    elif metric == "euclidean":
        table = _euclidean(left, left if right is None else right, xp, where)
    elif metric in ("cosine", "correlation"):
        table = 1.0 - np.clip(_product(left, left if right is None else right, xp, where), -1.0, 1.0)
    else:
        raise InputError(f"metric is '{metric}', which has no rule here; allowed: {', '.join(METRICS)}")
    if right is None:
        table = (table + table.T) / 2.0  # by rounding, a matrix times itself need not be symmetric to the last bit
        # Exactly 0 on the diagonal, but 1 for vectors without a correlation, as the module's docstring says.
        alike = np.ones(len(left), bool) if metric in ("euclidean", "manhattan") else left.any(axis=1)
        np.fill_diagonal(table, np.where(alike, 0.0, 1.0))
    return table


def _product(left: NDArray[np.float64], right: NDArray[np.float64], xp: ModuleType, where: str) -> NDArray[np.float64]:
    if xp is np:
        return np.asarray(left @ right.T)
    ours, theirs = (xp.from_numpy(np.ascontiguousarray(one)).to(where) for one in (left, right))
    return np.asarray((ours @ theirs.T).cpu().numpy())


def _euclidean(
    left: NDArray[np.float64], right: NDArray[np.float64], xp: ModuleType, where: str
) -> NDArray[np.float64]:
    # |x|^2 + |y|^2 - 2 x.y loses digits if the vectors are long and close together. Subtracting a common middle makes
    # them short and changes no distance.
    middle = left.mean(axis=0)
    left, right = left - middle, right - middle
    squares = np.square(left).sum(axis=1)[:, None] + np.square(right).sum(axis=1)
    squared = squares - 2.0 * _product(left, right, xp, where)
    # For nearly equal vectors the result may still be rounding alone; those pairs are subtracted directly.
    for i in range(len(left)):
        for js in np.array_split(close := np.flatnonzero(squared[i] < 1e-10 * squares[i]), len(close) // 1024 + 1):
            squared[i, js] = np.square(right[js] - left[i]).sum(axis=1)
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def _manhattan(left: NDArray[Any], right: NDArray[Any], xp: ModuleType, where: str) -> NDArray[np.float64]:
    if xp is not np:
        ours, theirs = (xp.from_numpy(np.ascontiguousarray(one)).to(where) for one in (left, right))
        return np.asarray(xp.cdist(ours, theirs, p=1).double().cpu().numpy())
    table = np.empty((len(left), len(right)))
    step = max(1, _CACHED // left.shape[1])
    for columns in _parts(len(right), step):
        part = right[columns]
        scratch = np.empty_like(part, dtype=np.result_type(left, part))
        for i, one in enumerate(left):
            np.subtract(part, one, out=scratch)
            np.abs(scratch, out=scratch)
            table[i, columns] = scratch.sum(axis=1)
    return table
