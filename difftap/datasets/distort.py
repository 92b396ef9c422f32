"""How the synthetic set's targets are made: the settings, the plan they lead to, the drawing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size
from difftap.datasets.layout import one_of
from difftap.datasets.render import occlude, recolour, resample, save_png
from difftap.datasets.warps import Warp, random_homography, random_thin_plate
from difftap.errors import InputError
from difftap.images import load_image

__all__ = ["KINDS", "Distortion", "Making", "keypoints"]

KINDS: dict[str, Callable[[np.random.Generator, Size, float], Warp]] = {
    "homography": random_homography,
    "thin-plate": random_thin_plate,
}
_VERSION = 1
"""Part of every target's key: raise it when the drawing changes."""
_PATCHES = 3


@dataclass(frozen=True)
class Distortion:
    """How targets are made from sources; the same one makes the same pixels.

    Attributes:
        seed: of everything random; each image and kind of warp has its own stream, whatever else is in the folder.
        kinds: the warps each image gets: ``homography``, ``thin-plate``.
        grid: keypoints are ``grid`` x ``grid`` pixel centres of the source.
        strength: how far the warp moves points, as a fraction of the shorter side; below 0.25.
        occlusion: fraction of the target that three patches of random colours cover at most; below 0.9.
        photometric: strength of the change of colour, from 0 (none) to 1.
    """

    seed: int = 0
    kinds: tuple[str, ...] = ("homography", "thin-plate")
    grid: int = 8
    strength: float = 0.15
    occlusion: float = 0.1
    photometric: float = 0.2

    def __post_init__(self) -> None:
        for kind in self.kinds:
            one_of("warp", kind, tuple(KINDS))
        fractions = 0 <= self.strength < 0.25 and 0 <= self.occlusion < 0.9 and 0 <= self.photometric <= 1
        if not (self.kinds and self.grid >= 1 and fractions):
            raise InputError(
                f"{self} is out of bounds; allowed: one warp or more, grid from 1, strength from 0 to below 0.25, "
                "occlusion from 0 to below 0.9, photometric from 0 to 1"
            )


@dataclass(frozen=True)
class Making:
    """One target: the settings, the kind of warp, the source's file and its digest."""

    distortion: Distortion
    kind: str
    file: Path
    digest: str

    @property
    def key(self) -> str:
        """Name and seed of the target: a digest of everything that decides its pixels."""
        d = self.distortion
        parts = (_VERSION, d.seed, float(d.strength), float(d.occlusion), float(d.photometric), self.kind, self.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def plan(self, size: Size) -> tuple[Warp, NDArray[np.int64], np.random.Generator]:
        """The warp, the covering patches ``(P, 4)`` (x1, y1, x2, y2, ends excluded), and a generator for the rest."""
        rng = np.random.default_rng(int(self.key, 16))
        warp = KINDS[self.kind](rng, size, self.distortion.strength)
        sides = np.sqrt(self.distortion.occlusion / _PATCHES) * rng.uniform(0.7, 1.0, (_PATCHES, 2))
        extent = np.floor(np.array(size) * sides).astype(np.int64)
        corner = np.floor((np.array(size) - extent) * rng.uniform(0, 1, (_PATCHES, 2))).astype(np.int64)
        return warp, np.hstack([corner, corner + extent]), rng

    def draw(self, path: Path) -> None:
        """Make the target and write it, whole or not at all."""
        image = load_image(self.file)
        warp, patches, rng = self.plan(image.size)
        pixels = recolour(resample(image.pixels, warp), rng, self.distortion.photometric)
        save_png(path, occlude(pixels, rng, patches))


def keypoints(making: Making, size: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The keypoints that stay in sight, ``(N, 2)`` in the source and ``(N, 2)`` in the target."""
    warp, patches, _ = making.plan(size)
    grid = making.distortion.grid
    xs, ys = (np.unique(np.floor((np.arange(grid) + 0.5) * side / grid)) for side in size)
    source = np.stack(np.meshgrid(xs, ys), axis=2).reshape(-1, 2)
    target = warp.forward(source)
    inside = ((target >= 0) & (target <= np.array(size) - 1)).all(axis=1)  # NaN compares false
    in_patch = (target[:, None] >= patches[:, :2] - 0.5) & (target[:, None] <= patches[:, 2:] - 0.5)  # (N, P, 2)
    in_patch &= (patches[:, 2:] > patches[:, :2])[None]  # patches of no area cover nothing
    covered = np.asarray(in_patch.all(axis=2), np.bool_)  # (N, P)
    seen = inside & ~covered.any(axis=1)
    return source[seen], target[seen]
