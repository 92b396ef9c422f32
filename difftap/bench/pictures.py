"""Pictures to measure with: the user's, or generated ones with texture and shading, as large as a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PIL

from difftap.errors import InputError
from difftap.images import PICTURE_ENDINGS, find_pictures

__all__ = ["choose_pictures", "write_pictures"]


def choose_pictures(paths: Sequence[Path], most: int = 8) -> tuple[Path, ...]:
    """Choose pictures: every file given, and up to ``most`` pictures below each folder, evenly spaced in path order.

    Raises:
        InputError: a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = find_pictures(path)
        if not inside:
            raise InputError(f"no pictures in '{path}'; allowed: files ending in {', '.join(PICTURE_ENDINGS)}")
        count = min(most, len(inside))
        found += [inside[k * len(inside) // count] for k in range(count)]
    return tuple(found)


def write_pictures(folder: Path, count: int = 2, size: tuple[int, int] = (500, 375)) -> tuple[Path, ...]:
    """Write ``count`` JPEG pictures made from a seed: noise at several scales, strongest at coarse ones as in photos.

    Args:
        folder: the folder to write to.
        count: number of pictures.
        size: their size ``(W, H)``.

    Returns:
        the files.
    """
    paths = []
    for k in range(count):
        stream = np.random.default_rng([20, k])
        total = np.zeros((size[1], size[0], 3), np.float32)
        for octave in range(6):
            cells = 3 * 2**octave
            coarse = stream.integers(0, 256, (cells, cells, 3), np.uint8)
            filtered = PIL.fromarray(coarse).resize(size, PIL.Resampling.BICUBIC)
            total += (np.asarray(filtered, np.float32) - 127.5) * 0.62**octave
        path = folder / f"picture-{k}.jpg"
        PIL.fromarray(np.clip(total + 127.5, 0, 255).astype(np.uint8)).save(path, quality=92)
        paths.append(path)
    return tuple(paths)
