"""Exact dense matching on the low-resolution map.

DIFT's evaluation enlarges both maps to image size, normalises every pixel's vector and takes the best cosine. The same
pixel is found here without enlarging anything that has channels. With T the target's cells, u the interpolation weights
of a pixel p and q a unit source descriptor,

    cosine(p) = <q, sum_i u_i T_i> / |sum_i u_i T_i|

The numerator is linear: one small map ``<q, T_i>`` per point, interpolated. The squared norm is the quadratic form
``sum_ij u_i u_j <T_i, T_j>``, which needs only the Gram products of cells that one pixel reads together: offsets up to
1 cell for bilinear (5 by symmetry), up to 3 for bicubic (25). It does not depend on the point, so a `DenseTarget` holds
it as one ``(H, W)`` image.

All sums run in float64: float32 would lose the norm where neighbouring cells nearly cancel, and rounding would decide
between pixels that tie.

Tie rule: cosines within `TIE` of the best count as equal, and the first pixel in row-major order wins. (Rounding
exceeds `TIE` only where opposite cells cancel to a thousandth of their length; equal cosines there may go either way.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.features import FeatureMap
from difftap.matching.confidence import RADIUS_CELLS
from difftap.matching.interpolate import axis_matrix, pixel_cells, unit

__all__ = ["TIE", "DenseTarget", "Peaks", "project"]

TIE = 1e-10
"""Cosines this close are equal: far above float64 rounding, far below what float32 features can tell apart."""

VANISHING = 1e-12
"""Interpolated vectors whose squared length is below this share of what their cells could give count as zero.

Opposite cells cancel between their centres; what is left there is rounding, and its cosine would be noise.
"""

_BLOCK_BYTES = 1 << 23
_TILE_PIXELS = 1 << 17  # one tile's float64 scores stay in a core's cache between product, norm and maximum
_BLOCK_VALUES = 1 << 17


@dataclass(frozen=True)
class Peaks:
    """Where N descriptors match a target best.

    Attributes:
        pixels: ``(N, 2)`` whole pixels ``(x, y)`` of the target's image.
        score: ``(N,)`` cosine there, higher is better, -1 to 1.
        margin: ``(N,)`` score less the best score farther than `RADIUS_CELLS` cells away, 0 to 2, higher is surer; NaN
            where not asked for, or where no pixel is that far.
    """

    pixels: NDArray[np.float64]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]


class DenseTarget:
    """A target made ready for dense matching; share one among all calls against the same map.

    Building it costs one pass over the map per Gram offset; memory is one float64 image of the target's size.

    Attributes:
        features: the target's map.
        interpolation: ``bilinear`` or ``bicubic``.
        inverse_norm: ``(H, W)``, one over the length of the interpolated vector at each pixel; 0 where it vanishes.
    """

    def __init__(self, features: FeatureMap, interpolation: str = "bilinear") -> None:
        self.features = features
        self.interpolation = interpolation
        width, height = features.grid
        self._columns, self._rows = pixel_cells(features.geometry, features.grid)  # (W,), (H,)
        self._across = axis_matrix(self._columns, width, interpolation)  # (W, w)
        self._down = axis_matrix(self._rows, height, interpolation)  # (H, h)
        reach = 1 if interpolation == "bilinear" else 3
        self.inverse_norm = _inverse_norm(features.data, self._down, self._across, reach)  # (H, W)

    def heat(self, descriptor: NDArray[np.floating]) -> NDArray[np.float64]:
        """Cosine ``(H, W)`` of one descriptor ``(C,)`` with every pixel of the target."""
        products = project(unit(descriptor)[None], self.features.data)[0]  # (h, w)
        scores: NDArray[np.float64] = self._down @ (products @ self._across.T)  # (H, W)
        scores *= self.inverse_norm
        return np.clip(scores, -1.0, 1.0, out=scores)

    def find(self, descriptors: NDArray[np.floating], margin: bool = True) -> Peaks:
        """The best pixel for each descriptor ``(N, C)``; the tie rule is in the module's docstring."""
        count = len(descriptors)
        height, width = self.inverse_norm.shape
        found = Peaks(np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan))
        scores = np.empty((height, width))
        per_point = self.features.grid[1] * max(width, self.features.grid[0]) * 8
        block = max(1, _BLOCK_BYTES // per_point)
        for start in range(0, count, block):
            queries = unit(descriptors[start : start + block])  # (n, C)
            stretched = project(queries, self.features.data) @ self._across.T  # (n, h, W)
            for n, rows in enumerate(stretched, start):
                found.pixels[n], found.score[n], found.margin[n] = self._peak(rows, scores, margin)
        np.clip(found.score, -1.0, 1.0, out=found.score)
        np.clip(found.margin, 0.0, 2.0, out=found.margin)  # a tied place may be ahead by rounding
        return found

    def _peak(
        self, stretched: NDArray[np.float64], scores: NDArray[np.float64], margin: bool
    ) -> tuple[tuple[int, int], float, float]:
        """Best pixel, its score and its margin, from products already stretched to ``(h, W)``; fills ``scores``."""
        height, width = scores.shape
        step = max(1, _TILE_PIXELS // width)
        tiles = [slice(y, min(y + step, height)) for y in range(0, height, step)]
        best = np.empty(len(tiles))
        for k, tile in enumerate(tiles):
            np.matmul(self._down[tile], stretched, out=scores[tile])
            np.multiply(scores[tile], self.inverse_norm[tile], out=scores[tile])
            best[k] = scores[tile].max()
        tied = best.max() - TIE
        first = tiles[int(np.argmax(best >= tied))]
        y, x = divmod(int(np.argmax(scores[first] >= tied)), width)
        y += first.start
        score = float(scores[y, x])
        if not margin:
            return (x, y), score, np.nan
        return (x, y), score, score - self._second(scores, tiles, best, x, y)

    def _second(
        self, scores: NDArray[np.float64], tiles: list[slice], best: NDArray[np.float64], x: int, y: int
    ) -> float:
        """Best score farther than the radius from ``(x, y)``, NaN if nothing is; overwrites what lies nearer."""
        right, down = self._columns - self._columns[x], self._rows - self._rows[y]  # in cells
        reach = RADIUS_CELLS + 1e-9  # a pixel exactly on the radius is near, however its coordinates were rounded
        x0, x1 = np.searchsorted(right, [-reach, reach])
        y0, y1 = np.searchsorted(down, [-reach, reach])
        near = np.square(down[y0:y1, None]) + np.square(right[x0:x1]) <= reach**2
        scores[y0:y1, x0:x1][near] = -np.inf
        for k, tile in enumerate(tiles):
            if tile.start < y1 and tile.stop > y0:
                best[k] = scores[tile].max()
        second = float(best.max())
        return second if second > -np.inf else np.nan


def project(queries: NDArray[np.float64], data: NDArray[np.floating]) -> NDArray[np.float64]:
    """Dot products of queries ``(N, C)`` with every cell of a map ``(C, h, w)``, as ``(N, h, w)`` float64."""
    channels, height, width = data.shape
    cells = data.reshape(channels, -1)
    products = np.zeros((len(queries), height * width))
    block = max(1, _BLOCK_VALUES // cells.shape[1])
    for start in range(0, channels, block):  # in blocks, so that no float64 copy of the whole map is made
        part = slice(start, start + block)
        products += queries[:, part] @ cells[part].astype(np.float64)
    return products.reshape(len(queries), height, width)


def _grams(data: NDArray[np.floating], reach: int) -> dict[tuple[int, int], NDArray[np.float64]]:
    """Dot products of cells with their neighbours, ``{(dy, dx): (h - dy, w - |dx|)}`` for offsets up to ``reach``.

    Half of the offsets are enough, the products being symmetric: ``dy > 0``, or ``dy == 0`` and ``dx >= 0``. An entry
    ``[y, x]`` belongs to the cell ``(y, x + max(0, -dx))`` and the one ``(dy, dx)`` further on.
    """
    channels, height, width = data.shape
    size = height * width
    offsets = [
        (dy, dx)
        for dy in range(min(reach, height - 1) + 1)
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1)
        if dy > 0 or dx >= 0
    ]
    sums = np.zeros((len(offsets), size))
    cells = data.reshape(channels, size)
    block = max(1, _BLOCK_VALUES // size)
    for start in range(0, channels, block):
        part = cells[start : start + block].astype(np.float64)
        for k, (dy, dx) in enumerate(offsets):
            step = dy * width + dx  # rows follow each other, so an offset is one shift; what wraps round is cut off
            sums[k, : size - step] += np.einsum("cp,cp->p", part[:, : size - step], part[:, step:])
    return {
        (dy, dx): sums[k].reshape(height, width)[: height - dy, max(0, -dx) : width - max(0, dx)]
        for k, (dy, dx) in enumerate(offsets)
    }


def _inverse_norm(
    data: NDArray[np.floating], down: NDArray[np.float64], across: NDArray[np.float64], reach: int
) -> NDArray[np.float64]:
    """One over the length of the interpolated vector at every pixel, ``(H, W)``; 0 where it vanishes.

    Args:
        data: ``(C, h, w)``.
        down: interpolation weights ``(H, h)``.
        across: interpolation weights ``(W, w)``.
        reach: farthest two cells that one pixel reads lie apart: 1 for bilinear, 3 for bicubic.
    """
    grams = _grams(data, reach)
    if not np.isfinite(grams[0, 0]).all():
        raise InputError("the feature map holds NaN or infinity; features must be finite, so extract them again")
    height, width = data.shape[1:]
    squared = np.zeros((len(down), len(across)))
    for dy in range(min(reach, height - 1) + 1):
        # The form is separable for each offset: weights of cell pairs down, Gram products, weights of pairs across.
        products, pairs = [], []
        for (other, dx), gram in grams.items():
            if other == dy:
                x0, x1 = max(0, -dx), width - max(0, dx)
                products.append(gram if dy == dx == 0 else 2 * gram)  # both orders of two different cells
                pairs.append(across[:, x0:x1] * across[:, x0 + dx : x1 + dx])  # (W, w - |dx|)
        rows = np.concatenate(products, axis=1) @ np.concatenate(pairs, axis=1).T  # (h - dy, W)
        squared += (down[:, : height - dy] * down[:, dy:]) @ rows
    lengths = np.sqrt(grams[0, 0])  # (h, w)
    longest = np.abs(down) @ lengths @ np.abs(across).T  # (H, W), the length if all cells pointed the same way
    present = squared > VANISHING * np.square(longest)
    inverse = np.zeros_like(squared)
    np.divide(1.0, np.sqrt(squared, where=present, out=inverse), where=present, out=inverse)
    return inverse
