"""Coordinates: the half-pixel rule, written once.

A point is ``(x, y)`` in pixels of its image, and integer coordinates are pixel *centres*: the centre of the top-left
pixel is ``(0, 0)`` and the image covers ``[-0.5, W - 0.5] x [-0.5, H - 0.5]``. Cells of a feature map are counted the
same way. Scaling therefore is ``(k + 0.5) * scale - 0.5``, the rule of ``align_corners=False``.
SD4Match's rule, ``align_corners=True``, is `CornerGeometry`.

Axis letters: N points; W H image pixels; w h cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.errors import InputError

__all__ = ["CornerGeometry", "Geometry", "Size", "rescale"]

Size = tuple[int, int]
"""``(width, height)``, in pixels or cells."""


def rescale(position: ArrayLike, scale: ArrayLike, offset: ArrayLike = 0.0) -> NDArray[np.float64]:
    """Convert pixel-centre coordinates to a grid with ``scale`` cells per pixel.

    Args:
        position: coordinates, of any shape.
        scale: cells of the new grid per cell of the old one; broadcasts against ``position``.
        offset: where the old grid's outer corner lies on the new grid, in cells from the new outer corner.

    >>> rescale([0.0, 1.0], 2.0).tolist()
    [0.5, 2.5]
    """
    # + 0.5 counts from the outer corner, where scaling is a plain product; - 0.5 counts from the first centre again.
    # float64: at 4,000 pixels a float32 is only exact to 1/4096, and callers compare points that went there and back.
    moved: NDArray[np.float64] = (np.asarray(position, np.float64) + 0.5) * np.asarray(scale) + np.asarray(offset) - 0.5
    return moved


@dataclass(frozen=True)
class Geometry:
    """How an image lies on the network's input, and so where its pixels fall among the cells of a feature map.

    Attributes:
        image: size of the image as decoded (and turned upright), ``(W, H)`` in pixels.
        input: size of the network's input, ``(W, H)`` in pixels.
        content: the part of the input that the image fills, ``(x0, y0, x1, y1)`` in input pixels measured from the
            input's outer corner; the whole input when the image was stretched.

    >>> geometry = Geometry.stretch(image=(500, 375), input=(768, 768))
    >>> geometry.to_cells([[249.5, 187.0]], grid=(48, 48)).tolist()   # the image's centre is the map's centre
    [[23.5, 23.5]]
    """

    image: Size
    input: Size
    content: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.content
        if min(*self.image, *self.input) < 1 or not (0 <= x0 < x1 <= self.input[0] and 0 <= y0 < y1 <= self.input[1]):
            raise InputError(
                f"impossible geometry: image {self.image}, input {self.input}, content {self.content}; sizes must be "
                "positive and the content must lie within the input"
            )

    @classmethod
    def stretch(cls, image: Size, input: Size) -> Geometry:  # noqa: A002 - the field's name
        """Let the image fill the whole input; its aspect ratio is not kept."""
        return cls(image, input, (0.0, 0.0, float(input[0]), float(input[1])))

    @classmethod
    def letterbox(cls, image: Size, input: Size) -> Geometry:  # noqa: A002 - the field's name
        """Keep the image's aspect ratio and centre it; whole pixels of padding fill the rest."""
        scale = min(input[0] / image[0], input[1] / image[1])
        # Whole pixels, because Pillow resizes to whole sizes: the geometry then is exactly what was done to the image.
        # At least one: a very long image (4000 x 1) would round to no pixel at all.
        width = min(input[0], max(1, round(image[0] * scale)))
        height = min(input[1], max(1, round(image[1] * scale)))
        x0, y0 = (input[0] - width) // 2, (input[1] - height) // 2
        return cls(image, input, (float(x0), float(y0), float(x0 + width), float(y0 + height)))

    @classmethod
    def laid(cls, fit: str, image: Size, input: Size) -> Geometry:  # noqa: A002 - the field's name
        """Lay the image on the input as a recipe's ``fit`` says: ``stretch`` or ``letterbox``."""
        return cls.stretch(image, input) if fit == "stretch" else cls.letterbox(image, input)

    def _affine(self, grid: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give scale and offset, for `rescale`, from image pixels to cells of a ``(w, h)`` grid over the input."""
        x0, y0, x1, y1 = self.content
        cells = np.array(grid, np.float64) / np.array(self.input, np.float64)  # cells per input pixel
        extent = np.array([x1 - x0, y1 - y0]) / np.array(self.image, np.float64)  # input pixels per image pixel
        return extent * cells, np.array([x0, y0]) * cells

    def to_cells(self, points: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Convert image pixels ``(N, 2)`` to cells ``(N, 2)`` of a ``(w, h)`` map; fractional, not clipped."""
        scale, offset = self._affine(grid)
        return rescale(np.reshape(np.asarray(points, np.float64), (-1, 2)), scale, offset)

    def to_pixels(self, cells: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Convert cells ``(N, 2)`` of a ``(w, h)`` map to image pixels ``(N, 2)``: the inverse of `to_cells`."""
        scale, offset = self._affine(grid)
        return rescale(np.reshape(np.asarray(cells, np.float64), (-1, 2)), 1.0 / scale, -offset / scale)

    def contains(self, points: ArrayLike) -> NDArray[np.bool_]:
        """Tell which points ``(N, 2)`` lie on the image: ``-0.5 <= x <= W - 0.5``, and ``H`` likewise for y.

        Returns:
            bool ``(N,)``.
        """
        xy = np.reshape(np.asarray(points, np.float64), (-1, 2))
        inside = (xy >= -0.5) & (xy <= np.array(self.image, np.float64) - 0.5)
        return np.asarray(inside.all(axis=1), np.bool_)


_FRAME = 768.0  # sides of the square, in pixels, into which SD4Match warps images, points and boxes


@dataclass(frozen=True)
class CornerGeometry(Geometry):
    """The geometry with SD4Match's aligned corners; only for an image that was stretched to the input.

    ``x_cell = x (w - 1) / (768 - 1)`` converts pixels of SD4Match's evaluation frame to cells, so corner pixels of that
    frame fall on corner cells, whatever the size of the network's input.
    """

    def _scale(self, grid: Size) -> NDArray[np.float64]:
        stretched = _FRAME / np.array(self.image, np.float64)
        return stretched * (np.array(grid, np.float64) - 1) / (_FRAME - 1)

    def to_cells(self, points: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Convert image pixels ``(N, 2)`` to cells ``(N, 2)``, clipped to the map."""
        xy = np.reshape(np.asarray(points, np.float64), (-1, 2))
        # The outer half of a border pixel lies beyond the centre of the corner cell, where there is nothing to read.
        return np.clip(xy * self._scale(grid), 0.0, np.array(grid, np.float64) - 1)

    def to_pixels(self, cells: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Convert cells ``(N, 2)`` to image pixels ``(N, 2)``: the inverse of `to_cells` inside the map."""
        return np.reshape(np.asarray(cells, np.float64), (-1, 2)) / self._scale(grid)
