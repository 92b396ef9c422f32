"""Exact dense matching on the low-resolution map.

DIFT's evaluation enlarges both maps to image size, normalises every pixel's vector and takes the best cosine. The same
pixel is found here without enlarging anything that has channels. With T the target's cells, u the interpolation weights
of a pixel p and q a unit source descriptor,

    cosine(p) = <q, sum_i u_i T_i> / |sum_i u_i T_i|

The numerator is linear: one small map ``<q, T_i>`` per point, interpolated. The squared norm is the quadratic form
``sum_ij u_i u_j <T_i, T_j>``, which needs only the Gram products of cells that one pixel reads together: offsets up to
1 cell for bilinear (5 by symmetry), up to 3 for bicubic (25). It does not depend on the point, so a `DenseTarget` holds
it as one ``(H, W)`` image (`difftap.matching.norms`).

All sums run in float64: float32 would lose the norm where neighbouring cells nearly cancel, and rounding would decide
between pixels that tie.

Tie rule: cosines within `TIE` of the best count as equal, and the first pixel in row-major order wins. Pixels beyond
the outermost cells' centres repeat the border's and so tie; of those the ones nearest the image's top left win.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.featuremap import FeatureMap
from difftap.matching.confidence import RADIUS_CELLS
from difftap.matching.halves import sum_in_halves
from difftap.matching.interpolate import SMALL, Run, axis_runs, pixel_cells, unit
from difftap.matching.norms import inverse_norms

__all__ = ["TIE", "DenseTarget", "Peaks", "project"]

TIE = 1e-9
"""Cosines this close are equal: far above float64 rounding, far below what float32 features can tell apart."""

_BLOCK_BYTES = 1 << 23  # of scratch for points handled together
_TILE_PIXELS = 1 << 17  # one tile's float64 scores stay in a core's cache between product, norm and maximum


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
        # Runs are cut so that the norms' products, the largest made of them, stay `SMALL`.
        pairs = 4 if interpolation == "bilinear" else 16
        across_longest = max(1, SMALL // (2 * pairs * height * 4))
        down_longest = max(1, SMALL // (pairs * len(self._columns)))
        self._across = axis_runs(self._columns, width, interpolation, across_longest)
        self._down = axis_runs(self._rows, height, interpolation, down_longest)
        self.inverse_norm = inverse_norms(features.data, self._down, self._across, interpolation)  # (H, W)
        self._tiles = _tiles(self._down, max(1, _TILE_PIXELS // len(self._columns)))

    def heat(self, descriptor: NDArray[np.floating]) -> NDArray[np.float64]:
        """Cosine ``(H, W)`` of one descriptor ``(C,)`` with every pixel of the target."""
        scores = np.empty(self.inverse_norm.shape)
        self._score(self._stretch(unit(descriptor)[None])[0], scores)
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
            stretched = self._stretch(unit(descriptors[start : start + block]))  # (n, h, W)
            for n, rows in enumerate(stretched, start):
                found.pixels[n], found.score[n], found.margin[n] = self._peak(rows, scores, margin)
        np.clip(found.score, -1.0, 1.0, out=found.score)
        np.clip(found.margin, 0.0, 2.0, out=found.margin)  # a tied place may be ahead by rounding
        return found

    def _stretch(self, queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """Dot products of unit queries ``(n, C)`` with the map, interpolated along rows only: ``(n, h, W)``."""
        products = project(queries, self.features.data)  # (n, h, w)
        rows = products.reshape(-1, products.shape[2])
        stretched = np.empty((len(rows), len(self._columns)))
        for run in self._across:
            np.matmul(rows[:, run.low : run.high], run.weights.T, out=stretched[:, run.start : run.stop])
        return stretched.reshape(*products.shape[:2], -1)

    def _score(self, stretched: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fill ``scores`` ``(H, W)`` from products stretched to ``(h, W)``; returns the best of each tile."""
        best = np.empty(len(self._tiles))
        for k, (tile, runs) in enumerate(self._tiles):
            for run in runs:
                np.matmul(run.weights, stretched[run.low : run.high], out=scores[run.start : run.stop])
            np.multiply(scores[tile], self.inverse_norm[tile], out=scores[tile])
            best[k] = scores[tile].max()
        return best

    def _peak(
        self, stretched: NDArray[np.float64], scores: NDArray[np.float64], margin: bool
    ) -> tuple[tuple[int, int], float, float]:
        """Best pixel, its score and its margin, from products already stretched to ``(h, W)``; fills ``scores``."""
        best = self._score(stretched, scores)
        tied = best.max() - TIE
        first = self._tiles[int(np.argmax(best >= tied))][0]
        y, x = divmod(int(np.argmax(scores[first] >= tied)), scores.shape[1])
        y += first.start
        score = float(scores[y, x])
        return (x, y), score, score - self._second(scores, best, x, y) if margin else np.nan

    def _second(self, scores: NDArray[np.float64], best: NDArray[np.float64], x: int, y: int) -> float:
        """Best score farther than the radius from ``(x, y)``, NaN if nothing is; overwrites what lies nearer."""
        right, down = self._columns - self._columns[x], self._rows - self._rows[y]  # in cells
        reach = RADIUS_CELLS + 1e-9  # a pixel exactly on the radius is near, however its coordinates were rounded
        x0, x1 = np.searchsorted(right, [-reach, reach])
        y0, y1 = np.searchsorted(down, [-reach, reach])
        near = np.square(down[y0:y1, None]) + np.square(right[x0:x1]) <= reach**2
        scores[y0:y1, x0:x1][near] = -np.inf
        for k, (tile, _) in enumerate(self._tiles):
            if tile.start < y1 and tile.stop > y0:
                best[k] = scores[tile].max()
        second = float(best.max())
        return second if second > -np.inf else np.nan


def _tiles(runs: list[Run], rows: int) -> list[tuple[slice, list[Run]]]:
    """Runs gathered into tiles of about ``rows`` pixel rows, each with the rows it covers."""
    tiles: list[tuple[slice, list[Run]]] = []
    for run in runs:
        if tiles and run.stop - tiles[-1][0].start <= rows:
            tile, members = tiles.pop()
            tiles.append((slice(tile.start, run.stop), [*members, run]))
        else:
            tiles.append((slice(run.start, run.stop), [run]))
    return tiles


def project(queries: NDArray[np.float64], data: NDArray[np.floating]) -> NDArray[np.float64]:
    """Dot products of queries ``(N, C)`` with every cell of a map ``(C, h, w)``, as ``(N, h, w)`` float64."""
    channels, height, width = data.shape
    size = height * width
    cells = data.reshape(channels, size)

    def over(some: range) -> NDArray[np.float64]:
        products = np.zeros((len(queries), size))
        for first in range(0, len(queries), 64):
            here = slice(first, first + 64)
            count = len(queries[here])
            block, step = SMALL // (count * size), size  # few queries: whole rows of products, a few channels at a time
            if block < 8:
                block = 64
                step = max(1, SMALL // (count * block))
            for start in some[::block]:  # in blocks, so that no float64 copy of the whole map is made
                stop = min(start + block, some.stop)
                part = cells[start:stop].astype(np.float64)
                for low in range(0, size, step):
                    products[here, low : low + step] += queries[here, start:stop] @ part[:, low : low + step]
        return products

    return sum_in_halves(channels, over).reshape(len(queries), height, width)
