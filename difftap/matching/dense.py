"""Exact dense matching on the low-resolution map.

DIFT's evaluation enlarges both maps to image size, normalises every pixel's vector and takes the best cosine. Here the
same pixel is found without enlarging a map with channels. With T the target's cells, u the interpolation weights of a
pixel p, and q a unit source descriptor,

    cosine(p) = <q, sum_i u_i T_i> / |sum_i u_i T_i|

The numerator is linear: one small map ``<q, T_i>`` per point, interpolated. The squared norm is the quadratic form
``sum_ij u_i u_j <T_i, T_j>``. It needs only the Gram products of cells that one pixel reads together: offsets of up to
1 cell for bilinear (5 of them by symmetry), up to 3 for bicubic (25). It does not depend on the point, so a
`DenseTarget` holds it as one ``(H, W)`` image (`difftap.matching.norms`).

All sums are in float64: float32 would lose the norm where neighbouring cells nearly cancel, and its rounding would
decide between pixels that tie.

Tie rule: cosines within `TIE` of the best count as equal, and the first pixel in row-major order wins. Pixels beyond
the centres of the border cells repeat those cells and so tie; among them the one nearest the top left wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.matching.confidence import RADIUS_CELLS
from difftap.matching.descriptors import Descriptors, mean_cosine
from difftap.matching.interpolate import SMALL, AxisRun, axis_runs, pixel_cells
from difftap.matching.norms import inverse_norms

__all__ = ["TIE", "DenseTarget", "Peaks"]

TIE = 1e-9
"""Cosines this close count as equal: far above float64 rounding, far below what float32 features can distinguish."""

_BLOCK_BYTES = 1 << 23  # scratch memory for the points that are handled together
_TILE_PIXELS = 1 << 17  # a tile's scores, 1 MiB of float64, stay in a core's cache between product, norm and maximum


@dataclass(frozen=True)
class Peaks:
    """The best place on a target for each of N descriptors.

    Attributes:
        pixels: ``(N, 2)`` whole pixels ``(x, y)`` of the target's image.
        score: ``(N,)`` cosine there, higher is better, -1 to 1.
        margin: ``(N,)`` score less the best score more than `RADIUS_CELLS` cells away, 0 to 2, higher is surer; NaN if
            not asked for, or if no pixel is that far away.
    """

    pixels: NDArray[np.float64]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]


class DenseTarget:
    """A target prepared for dense matching. Share one among all calls against the same image.

    Preparing it takes one pass over the maps per Gram offset. Its memory is one float64 image of the target's size for
    each of the descriptors.

    Args:
        descriptors: the target's: one, or several whose cosines are multiplied.
        interpolation: ``bilinear`` or ``bicubic``.

    Attributes:
        inverse_norms: for each of the descriptors ``(H, W)``: one over the length of the interpolated vector at each
            pixel; 0 where the vector vanishes.
    """

    def __init__(self, descriptors: Sequence[Descriptors], interpolation: str = "bilinear") -> None:
        self._descriptors = tuple(descriptors)
        geometry, (width, height) = descriptors[0].geometry, descriptors[0].grid
        self._columns, self._rows = pixel_cells(geometry, (width, height))  # (W,), (H,)
        # Runs are cut short enough for the largest matrix products made from them, those of the norms, to stay `SMALL`.
        reach, pairs = (1, 4) if interpolation == "bilinear" else (3, 16)  # a pixel reads cells up to this far apart
        across_longest = max(1, SMALL // (2 * pairs * height * 4))
        down_longest = max(1, SMALL // (pairs * len(self._columns)))
        self._across = axis_runs(self._columns, width, interpolation, across_longest)
        self._down = axis_runs(self._rows, height, interpolation, down_longest)

        def norms(one: Descriptors) -> NDArray[np.float64]:
            def read(y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.float64]:
                return one.between(np.stack([self._columns[x], self._rows[y]], axis=1), interpolation)

            return inverse_norms(one.grams(reach), self._down, self._across, read)

        self.inverse_norms = [norms(one) for one in descriptors]
        self._tiles = _tiles(self._down, max(1, _TILE_PIXELS // len(self._columns)))

    @property
    def nbytes(self) -> int:
        """Memory of the norms, in bytes."""
        return sum(norm.nbytes for norm in self.inverse_norms)

    def heat(self, queries: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Score one query at every pixel of the target.

        Args:
            queries: the query's unit vector ``(1, C)`` for each of the target's descriptors.

        Returns:
            cosines ``(H, W)``.
        """
        scores = np.empty(self.inverse_norms[0].shape)
        self._score([one[0] for one in self._stretch(queries)], scores)
        return np.clip(scores, -1.0, 1.0, out=scores)

    def find(self, queries: Sequence[NDArray[np.float64]], margin: bool = True) -> Peaks:
        """Find the best pixel for each query. The module's docstring has the tie rule.

        Args:
            queries: unit vectors ``(N, C)`` for each of the target's descriptors.
            margin: also compute margins.
        """
        count = len(queries[0])
        height, width = self.inverse_norms[0].shape
        found = Peaks(np.zeros((count, 2)), np.zeros(count), np.full(count, np.nan))
        scores = np.empty((height, width))
        across, down = self._descriptors[0].grid
        block = max(1, _BLOCK_BYTES // (down * max(width, across) * 8))
        for start in range(0, count, block):
            stretched = self._stretch([one[start : start + block] for one in queries])  # (n, h, W) each
            for n in range(len(stretched[0])):
                best = self._score([one[n] for one in stretched], scores)
                k = start + n
                found.pixels[k], found.score[k], found.margin[k] = self._peak(scores, best, margin)
        np.clip(found.score, -1.0, 1.0, out=found.score)
        np.clip(found.margin, 0.0, 2.0, out=found.margin)  # another place that ties may be ahead by rounding
        return found

    def _stretch(self, queries: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Multiply unit queries ``(n, C)`` with the cells, and interpolate along x only: ``(n, h, W)`` each."""
        found = []
        for query, one in zip(queries, self._descriptors, strict=True):
            products = one.products(query)  # (n, h, w)
            rows = products.reshape(-1, products.shape[2])
            stretched = np.empty((len(rows), len(self._columns)))
            for run in self._across:
                np.matmul(rows[:, run.low : run.high], run.weights.T, out=stretched[:, run.start : run.stop])
            found.append(stretched.reshape(*products.shape[:2], -1))
        return found

    def _score(self, stretched: Sequence[NDArray[np.float64]], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fill ``scores`` ``(H, W)`` from products stretched to ``(h, W)``; give the best score of each tile."""
        best = np.empty(len(self._tiles))
        for k, (tile, runs) in enumerate(self._tiles):
            here = scores[tile]
            cosines = [here, *(np.empty_like(here) for _ in stretched[1:])]
            for rows, norm, cosine in zip(stretched, self.inverse_norms, cosines, strict=True):
                for run in runs:
                    out = cosine[run.start - tile.start : run.stop - tile.start]
                    np.matmul(run.weights, rows[run.low : run.high], out=out)
                np.multiply(cosine, norm[tile], out=cosine)
            if len(cosines) > 1:
                here[...] = mean_cosine(cosines, self._descriptors)
            best[k] = here.max()
        return best

    def _peak(
        self, scores: NDArray[np.float64], best: NDArray[np.float64], margin: bool
    ) -> tuple[tuple[int, int], float, float]:
        """Give the best pixel ``(x, y)``, its score and its margin, from ``scores`` and the best score of each tile."""
        # The first pixel that ties lies in the first tile that holds one, so only that tile is searched.
        tied = best.max() - TIE
        first = self._tiles[int(np.argmax(best >= tied))][0]
        y, x = divmod(int(np.argmax(scores[first] >= tied)), scores.shape[1])
        y += first.start
        score = float(scores[y, x])
        return (x, y), score, score - self._second(scores, best, x, y) if margin else np.nan

    def _second(self, scores: NDArray[np.float64], best: NDArray[np.float64], x: int, y: int) -> float:
        """Give the best score farther from ``(x, y)`` than the radius; NaN if there is none.

        Nearer scores are overwritten: they are not needed any more.
        """
        right, down = self._columns - self._columns[x], self._rows - self._rows[y]  # in cells
        reach = RADIUS_CELLS + 1e-9  # a pixel exactly on the radius counts as near, whatever its rounding
        x0, x1 = np.searchsorted(right, [-reach, reach])
        y0, y1 = np.searchsorted(down, [-reach, reach])
        near = np.square(down[y0:y1, None]) + np.square(right[x0:x1]) <= reach**2
        scores[y0:y1, x0:x1][near] = -np.inf
        for k, (tile, _) in enumerate(self._tiles):
            if tile.start < y1 and tile.stop > y0:
                best[k] = scores[tile].max()
        second = float(best.max())
        return second if second > -np.inf else np.nan


def _tiles(runs: list[AxisRun], rows: int) -> list[tuple[slice, list[AxisRun]]]:
    """Group runs into tiles of at most about ``rows`` pixel rows; give each tile's rows and its runs."""
    tiles: list[tuple[slice, list[AxisRun]]] = []
    for run in runs:
        if tiles and run.stop - tiles[-1][0].start <= rows:
            tile, members = tiles.pop()
            tiles.append((slice(tile.start, run.stop), [*members, run]))
        else:
            tiles.append((slice(run.start, run.stop), [run]))
    return tiles
