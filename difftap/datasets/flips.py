"""Mirroring left to right: annotations, and copies of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from difftap.datasets.parse import Side
from difftap.datasets.render import save_png
from difftap.images import load_image

__all__ = ["mirrored", "mirrored_copy", "write_mirrored"]


def mirrored(side: Side) -> Side:
    """The annotations as they are in the mirrored image: pixel 0 goes to pixel W - 1 (`difftap.coords`).

    >>> side = mirrored(Side(Path("a.png"), (10, 8), np.array([[0.0, 5.0]]), (0.0, 1.0, 3.0, 2.0)))
    >>> side.points.tolist(), side.box
    ([[9.0, 5.0]], (6.0, 1.0, 9.0, 2.0))
    """
    end = side.size[0] - 1.0
    points = np.stack([end - side.points[:, 0], side.points[:, 1]], axis=1)
    box = side.box and (end - side.box[2], side.box[1], end - side.box[0], side.box[3])
    return replace(side, points=points, box=box)


def mirrored_copy(image: Path, digest: str, cache: Path) -> Path:
    """Where an image's mirrored copy belongs, by the digest of the image's file."""
    return cache / f"{image.stem}-{digest[:16]}-mirrored.png"


def write_mirrored(image: Path, copy: Path) -> None:
    """Write an image, upright and mirrored, as PNG."""
    save_png(copy, load_image(image).pixels[:, ::-1])
