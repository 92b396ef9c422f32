"""Joining maps of several branches into one whose cosine is the weighted mean of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.coords import rescale
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.interpolate import axis_matrix
from difftap.recipe import INTERPOLATIONS

__all__ = ["combine"]


def combine(maps: Sequence[FeatureMap], weights: Sequence[float], upsample: str = "bicubic") -> FeatureMap:
    """Join maps of one image as the poster's dual layer does.

    Each map is L2-normalised per cell, interpolated to the finest grid, normalised again, multiplied by the square root
    of its share and concatenated. The cosine of two joined vectors then is the share-weighted mean of the branches'
    cosines. One map is returned as it is.

    Args:
        maps: maps ``(C_i, h_i, w_i)`` of the same image under the same geometry.
        weights: one positive number per map; divided by their sum they are the shares.
        upsample: ``bilinear`` or ``bicubic``, as `axis_taps`.

    Returns:
        a map ``(sum of C_i, max of h_i, max of w_i)``.

    Raises:
        InputError: no map, maps of different images, or weights that do not fit.
    """
    if not maps:
        raise InputError("no feature maps to combine; give at least one")
    if len(weights) != len(maps):
        raise InputError(f"{len(weights)} weights for {len(maps)} feature maps; give one weight per map")
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise InputError(f"weights are {list(weights)}; allowed: finite numbers above 0")
    if upsample not in INTERPOLATIONS:
        raise InputError(f"upsample is {upsample!r}; allowed: {', '.join(INTERPOLATIONS)}")
    geometry = maps[0].geometry
    for other in maps[1:]:
        if other.geometry != geometry:
            raise InputError(
                f"feature maps lie differently on their images: {geometry} and {other.geometry}; "
                "combine maps of the same image at the same input size"
            )
    if len(maps) == 1:
        return maps[0]
    width = max(m.grid[0] for m in maps)
    height = max(m.grid[1] for m in maps)
    total = math.fsum(weights)
    joined = np.empty((sum(m.channels for m in maps), height, width), np.float32)
    start = 0
    for m, weight in zip(maps, weights, strict=True):
        part = joined[start : start + m.channels]
        _resize(_normalised(m.data), upsample, out=part)
        np.multiply(_normalised(part), np.float32(math.sqrt(weight / total)), out=part)
        start += m.channels
    return FeatureMap(joined, geometry)


def _normalised(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """A map ``(C, h, w)`` with every cell scaled to length 1; zero cells stay zero."""
    lengths = np.sqrt(np.einsum("cyx,cyx->yx", data, data, dtype=np.float64))
    return (data / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def _resize(data: NDArray[np.float32], interpolation: str, out: NDArray[np.float32]) -> None:
    """Interpolate a map ``(C, h, w)`` to the grid of ``out`` ``(C, h', w')``, both over the same area."""
    if data.shape == out.shape:
        out[...] = data
        return
    (_, height, width), (_, rows, columns) = data.shape, out.shape
    across = axis_matrix(rescale(np.arange(columns), width / columns), width, interpolation).astype(np.float32)
    down = axis_matrix(rescale(np.arange(rows), height / rows), height, interpolation).astype(np.float32)
    np.matmul(down, data @ across.T, out=out)  # (C, h, w) @ (w, w') -> (C, h, w'); (h', h) @ that -> (C, h', w')
