"""The feature map: one tap's output for one image, with the geometry that relates its cells to the image's pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry, Size
from difftap.errors import InputError

__all__ = ["FeatureMap"]


@dataclass(frozen=True)
class FeatureMap:
    """One tap's output for one image.

    Attributes:
        data: float32, ``(C, h, w)``, channels first, rows from the top; not normalised.
        geometry: converts image pixels to cells and back.
    """

    data: NDArray[np.float32]
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or min(self.data.shape) < 1:
            raise InputError(f"a feature map is (C, h, w) with no empty axis, got shape {self.data.shape}")

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return int(self.data.shape[0])

    @property
    def grid(self) -> Size:
        """``(w, h)`` in cells."""
        return int(self.data.shape[2]), int(self.data.shape[1])

    @property
    def image_size(self) -> Size:
        """``(W, H)`` of the image in pixels."""
        return self.geometry.image

    def to_cells(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert image pixels ``(N, 2)`` to this map's cells ``(N, 2)``."""
        return self.geometry.to_cells(points, self.grid)

    def to_pixels(self, cells: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert this map's cells ``(N, 2)`` to image pixels ``(N, 2)``."""
        return self.geometry.to_pixels(cells, self.grid)
