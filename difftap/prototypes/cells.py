"""Choose the cells of a map that stand for an object, from the object's mask.

The study's paper does not say how masks are scaled to the map, so the rule is an option. ``area`` keeps the cells that
the mask covers by more than half; ``nearest`` keeps those whose centre lies in the mask. If an object is so small that
the rule keeps none, the one cell that its mask covers most is kept, and the object is marked as small.

Axis letters: K objects; H W image pixels; h w cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size
from difftap.datasets.objects import Mask
from difftap.errors import InputError

__all__ = ["RULES", "KeptCells", "cell_shares", "keep_cells"]

RULES = ("area", "nearest")


@dataclass(frozen=True, eq=False)
class KeptCells:
    """The cells that stand for K objects.

    Attributes:
        kept: bool, ``(K, h, w)``; at least one cell per object.
        counts: ``(K,)``, number of cells kept.
        coverage: ``(K,)``, the share of a kept cell that the mask covers, 0 to 1, averaged over the kept cells.
        small: bool, ``(K,)``, whether the rule kept no cell, so that the most covered cell is kept instead.
    """

    kept: NDArray[np.bool_]
    counts: NDArray[np.int32]
    coverage: NDArray[np.float32]
    small: NDArray[np.bool_]


def cell_shares(masks: Mask, geometry: Geometry, grid: Size) -> NDArray[np.float32]:
    """Compute the share of each cell that a mask covers.

    Pixels and cells are squares, and a cell's border may cut a pixel, so the shares are exact. Cells in a letterbox's
    padding have share 0.

    Args:
        masks: bool, ``(K, H, W)``.
        geometry: how the image lies on the network's input.
        grid: ``(w, h)`` of the map.

    Returns:
        float32, ``(K, h, w)``, 0 to 1.

    Raises:
        InputError: the masks are not as large as the image.
    """
    width, height = geometry.image
    if masks.shape[1:] != (height, width):
        raise InputError(
            f"masks are {masks.shape[1:]}, the image ({height}, {width}); give masks as large as the image"
        )
    corners = np.array([[-0.5, -0.5], [grid[0] - 0.5, grid[1] - 0.5]])  # outer corners of the first and last cell
    low, high = geometry.to_pixels(corners, grid) + 0.5  # from pixel centres to distances from the image's border
    across = _overlaps(low[0], high[0], grid[0], width)  # (w, W)
    down = _overlaps(low[1], high[1], grid[1], height)  # (h, H)
    # Overlap of squares is a product of overlaps along the axes, so two small matrices do it.
    shares: NDArray[np.float32] = np.matmul(np.matmul(down, masks.astype(np.float32)), across.T)
    return np.clip(shares, 0.0, 1.0)  # sums of rounded shares may exceed 1 in the last digit


def _overlaps(low: float, high: float, cells: int, pixels: int) -> NDArray[np.float32]:
    """Compute the share of each cell that each pixel takes along one axis.

    Args:
        low: the first cell's outer border, in pixels from the image's border.
        high: the last cell's outer border.
        cells: number of cells between them.
        pixels: number of pixels of the image.

    Returns:
        float32 ``(cells, pixels)``; the row of a cell that lies in the image sums to 1.
    """
    borders = np.linspace(low, high, cells + 1)
    edges = np.arange(pixels + 1, dtype=np.float64)
    start = np.maximum(borders[:-1, None], edges[None, :-1])
    stop = np.minimum(borders[1:, None], edges[None, 1:])
    share: NDArray[np.float32] = (np.maximum(stop - start, 0.0) / ((high - low) / cells)).astype(np.float32)
    return share


def keep_cells(masks: Mask, geometry: Geometry, grid: Size, rule: str = "area") -> KeptCells:
    """Choose the cells that stand for each object.

    Args:
        masks: bool, ``(K, H, W)``; none of them empty.
        geometry: how the image lies on the network's input.
        grid: ``(w, h)`` of the map.
        rule: ``area`` (a share of more than 0.5) or ``nearest`` (the pixel at the cell's centre is in the mask).

    Raises:
        InputError: another rule, or a mask that covers nothing of the map.
    """
    if rule not in RULES:
        raise InputError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
    shares = cell_shares(masks, geometry, grid)
    kept = np.asarray(shares > 0.5, np.bool_) if rule == "area" else _nearest(masks, geometry, grid)
    flat = shares.reshape(len(masks), grid[0] * grid[1])
    if len(masks) and not (flat > 0).any(axis=1).all():
        raise InputError("a mask covers nothing of the image; an object needs at least one pixel")
    small = ~kept.any(axis=(1, 2))
    fallback = np.unravel_index(flat[small].argmax(axis=1), shares.shape[1:])
    kept[(np.flatnonzero(small), *fallback)] = True
    counts = kept.sum(axis=(1, 2)).astype(np.int32)
    coverage = ((shares * kept).sum(axis=(1, 2)) / np.maximum(counts, 1)).astype(np.float32)
    return KeptCells(kept, counts, coverage, np.asarray(small, np.bool_))


def _nearest(masks: Mask, geometry: Geometry, grid: Size) -> NDArray[np.bool_]:
    """Sample the mask at each cell's centre, ``(K, h, w)``; a centre on the border of two pixels reads the second."""
    width, height = geometry.image
    diagonal = np.arange(max(grid), dtype=np.float64)  # x and y are independent: a diagonal gives both axes
    centres = geometry.to_pixels(np.stack([diagonal, diagonal], axis=1), grid)
    # 1e-9: a centre that is meant to lie on a border must not fall before it by rounding.
    columns = np.floor(centres[: grid[0], 0] + 0.5 + 1e-9).astype(np.int64)
    rows = np.floor(centres[: grid[1], 1] + 0.5 + 1e-9).astype(np.int64)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    read = masks[:, rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None]]
    return np.asarray(read & inside, np.bool_)
