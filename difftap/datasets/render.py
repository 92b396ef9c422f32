"""Drawing the synthetic set's targets: resample under a warp, recolour, cover, save."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path, output_errors
from difftap.datasets.warps import Warp

__all__ = ["occlude", "recolour", "resample", "save_png"]

_GREY = 127.0
_ROWS = 64  # rows drawn at once: bounds the memory


def resample(pixels: NDArray[np.uint8], warp: Warp) -> NDArray[np.float64]:
    """The target ``(H, W, 3)`` of a warp, bilinear, as large as the source; mid-grey where the source has nothing."""
    height, width = pixels.shape[:2]
    drawn = np.full((height, width, 3), _GREY)
    for top in range(0, height, _ROWS):
        ys, xs = np.mgrid[top : min(top + _ROWS, height), 0:width]
        origin = warp.backward(np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float64))
        ends = np.array([width - 1, height - 1])
        inside = ((origin >= 0) & (origin <= ends)).all(axis=1)  # NaN compares false
        x, y = origin[inside].T
        x0, y0 = np.minimum(x.astype(np.int64), width - 2), np.minimum(y.astype(np.int64), height - 2)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        upper = pixels[y0, x0] * (1 - fx) + pixels[y0, x0 + 1] * fx
        lower = pixels[y0 + 1, x0] * (1 - fx) + pixels[y0 + 1, x0 + 1] * fx
        drawn[top : top + _ROWS].reshape(-1, 3)[inside] = upper * (1 - fy) + lower * fy
    return drawn


def recolour(pixels: NDArray[np.float64], rng: np.random.Generator, strength: float) -> NDArray[np.uint8]:
    """Change gamma, contrast, brightness and the balance of the channels, and add noise."""
    gamma, contrast = np.exp(rng.uniform(-1, 1, 2) * strength)
    brightness = rng.uniform(-0.5, 0.5) * strength
    balance = np.exp(rng.uniform(-0.5, 0.5, 3) * strength)
    noise = rng.standard_normal(pixels.shape) * 0.05 * strength
    values = (np.clip(pixels / 255.0, 0, 1) ** gamma - 0.5) * contrast * balance + 0.5 + brightness + noise
    coloured: NDArray[np.uint8] = np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8)
    return coloured


def occlude(pixels: NDArray[np.uint8], rng: np.random.Generator, patches: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Cover patches ``(P, 4)`` (x1, y1, x2, y2, ends excluded) with squares of random colours."""
    covered = pixels.copy()
    for x1, y1, x2, y2 in patches:
        coarse = rng.integers(0, 256, ((y2 - y1) // 8 + 1, (x2 - x1) // 8 + 1, 3), np.uint8)
        covered[y1:y2, x1:x2] = coarse.repeat(8, axis=0).repeat(8, axis=1)[: y2 - y1, : x2 - x1]
    return covered


def save_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an image ``(H, W, 3)``, whole or not at all, making its folder if need be."""
    from PIL import Image as PIL

    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as scratch:
        PIL.fromarray(np.ascontiguousarray(pixels)).save(scratch, format="PNG")
