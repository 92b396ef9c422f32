"""Compute prototypes: the mean of a map, or of several joined maps, over an object's cells.

Several maps are joined as in the study: interpolated bilinearly to the largest grid and concatenated without
normalisation. The joined map is never made. Interpolation and mean are linear, so the mean over cells of the fine grid
is a weighted sum over cells of the coarse grid.

Axis letters: K objects; C channels; h w cells; D width of a prototype, the sum of all C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size, rescale
from difftap.datasets.objects import Mask
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.interpolate import axis_matrix
from difftap.prototypes.cells import KeptCells, keep_cells

__all__ = ["average", "joined_grid", "prototypes"]


def joined_grid(maps: Sequence[FeatureMap]) -> Size:
    """Give the size ``(w, h)`` of the largest grid among maps, to which masks are scaled."""
    return max(m.grid[0] for m in maps), max(m.grid[1] for m in maps)


def average(maps: Sequence[FeatureMap], cells: KeptCells) -> NDArray[np.float32]:
    """Average the joined maps over each object's cells.

    Args:
        maps: maps ``(C_i, h_i, w_i)`` of one image, with the same geometry.
        cells: the kept cells of the largest grid.

    Returns:
        float32 ``(K, D)``.
    """
    count, rows, columns = cells.kept.shape
    weights = cells.kept / np.maximum(cells.counts, 1)[:, None, None]  # (K, h, w), sums to 1
    parts = []
    for m in maps:
        width, height = m.grid
        own = weights
        if (height, width) != (rows, columns):
            # The transposed interpolation carries the weights of fine cells to the coarse cells they are made from.
            across = axis_matrix(rescale(np.arange(columns), width / columns), width, "bilinear")  # (w, w_i)
            down = axis_matrix(rescale(np.arange(rows), height / rows), height, "bilinear")  # (h, h_i)
            own = down.T @ weights @ across  # (K, h_i, w_i)
        flat = own.reshape(count, width * height).astype(np.float32)
        parts.append(flat @ m.data.reshape(m.channels, -1).T)
    return np.concatenate(parts, axis=1) if parts else np.zeros((count, 0), np.float32)


def prototypes(maps: Sequence[FeatureMap], masks: Mask, rule: str = "area") -> tuple[NDArray[np.float32], KeptCells]:
    """Compute the prototypes of objects.

    Args:
        maps: maps ``(C_i, h_i, w_i)`` of one image, with the same geometry.
        masks: bool, ``(K, H, W)``.
        rule: how cells are chosen, one of `difftap.prototypes.cells.RULES`.

    Returns:
        float32 ``(K, D)``, and the cells that were averaged.

    Raises:
        InputError: no map, maps of different images, an unknown rule, or an empty mask.
    """
    if not maps:
        raise InputError("no feature map to average; give at least one")
    if any(m.geometry != maps[0].geometry for m in maps):
        raise InputError("feature maps lie differently on their images; join maps of one image at one input size")
    cells = keep_cells(masks, maps[0].geometry, joined_grid(maps), rule)
    return average(maps, cells), cells
