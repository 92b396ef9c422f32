"""Synthetic pairs: each image of any folder, paired with a copy that is warped, recoloured and partly covered.

The ground truth is exact: keypoints lie on the source's pixel centres, and the warp gives their place in the target.
Keypoints that leave the image or are covered are left out. A warp maps points of the target ``backward`` to the source,
which is how the target is drawn, and points of the source ``forward`` to the target, which is the ground truth. Points
are ``(N, 2)``, x and y in pixels (`difftap.coords`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.manifest import file_digest
from difftap.coords import Size
from difftap.datasets.keypoints import Collector, Dataset, Sample, save_png
from difftap.datasets.layout import BadPairError, DatasetError, Tree, draw_tree, one_of, require_files
from difftap.errors import InputError
from difftap.images import FolderScan, load_image, walk_folder

__all__ = [
    "KINDS",
    "SPLITS",
    "TREE",
    "Distortion",
    "Homography",
    "ThinPlate",
    "Warp",
    "WarpedTarget",
    "keypoints",
    "load",
    "occlude",
    "random_homography",
    "random_thin_plate",
    "recolour",
    "resample",
    "variants",
]

# ---- homographies and thin-plate splines, with their inverses

_Array = NDArray[np.float64]
_STEPS = 50  # at most so many iterations of Newton's method
_EXACT = 1e-9  # pixels that the result of Newton's method may be off by
_FOLD = 0.2  # least local area scale of a spline, source over target; below it the sheet is about to fold


class Warp(Protocol):
    """A map between two images, both ways."""

    def backward(self, points: _Array) -> _Array:
        """Map points of the target to the source."""

    def forward(self, points: _Array) -> _Array:
        """Map points of the source to the target; NaN for a point that has no place there."""


def _project(matrix: _Array, points: _Array) -> _Array:
    moved = points @ matrix[:, :2].T + matrix[:, 2]  # (N, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Not positive: the point lies on or beyond the horizon of the plane, and has no image.
        return np.where(moved[:, 2:] > 0, moved[:, :2] / moved[:, 2:], np.nan)


@dataclass(frozen=True, eq=False)
class Homography:
    """A plane seen from another place.

    Attributes:
        matrix: ``(3, 3)``, maps source to target; the third coordinate is positive for all points of the source.
    """

    matrix: _Array

    def forward(self, points: _Array) -> _Array:
        """Map points of the source to the target."""
        return _project(self.matrix, points)

    def backward(self, points: _Array) -> _Array:
        """Map points of the target to the source."""
        inverse = np.linalg.inv(self.matrix)
        return _project(inverse / inverse[2, 2], points)


@dataclass(frozen=True, eq=False)
class ThinPlate:
    """A thin-plate spline: ``backward(t) = t + affine([1, t]) + sum_k weights_k U(|t - controls_k|)``.

    U(r) = r^2 log r^2 (Bookstein, 1989).

    Attributes:
        controls: ``(K, 2)``, in units of ``scale`` pixels.
        weights: ``(K, 2)``.
        affine: ``(3, 2)``.
        scale: pixels per unit.
    """

    controls: _Array
    weights: _Array
    affine: _Array
    scale: float

    @classmethod
    def fit(cls, controls: _Array, offsets: _Array, scale: float) -> ThinPlate:
        """Fit the spline that moves each control point ``(K, 2)`` of the target by its offset ``(K, 2)``, in pixels."""
        units, count = controls / scale, len(controls)
        system = np.zeros((count + 3, count + 3))
        system[:count, :count] = _kernel(((units[:, None] - units[None]) ** 2).sum(axis=2))
        system[:count, count:] = np.column_stack([np.ones(count), units])
        system[count:, :count] = system[:count, count:].T
        solved: _Array = np.linalg.solve(system, np.vstack([offsets / scale, np.zeros((3, 2))])).astype(np.float64)
        return cls(units, solved[:count], solved[count:], scale)

    def backward(self, points: _Array) -> _Array:
        """Map points of the target to the source."""
        units = points / self.scale
        squares = ((units[:, None] - self.controls[None]) ** 2).sum(axis=2)  # (N, K)
        moved: _Array = units + self.affine[0] + units @ self.affine[1:] + _kernel(squares) @ self.weights
        return moved * self.scale

    def jacobian(self, points: _Array) -> _Array:
        """Give the derivative of `backward`, ``(N, 2, 2)``: axis 1 is x and y of the source, axis 2 of the target."""
        units = points / self.scale
        apart = units[:, None] - self.controls[None]  # (N, K, 2)
        squares = (apart**2).sum(axis=2)
        # dU/dt = slope * apart. The floor avoids log 0 at a control point, where ``apart`` makes the product 0.
        slope = 2 * (np.log(np.maximum(squares, 1e-300)) + 1)
        bend = np.einsum("nk,nkj,ki->nij", slope, apart, self.weights)
        derivative: _Array = np.eye(2) + self.affine[1:].T + bend
        return derivative

    def forward(self, points: _Array) -> _Array:
        """Map points of the source to the target by Newton's method; NaN where it does not converge."""
        found = points - (self.backward(points) - points)  # the first guess: the opposite move
        for _ in range(_STEPS):
            error = self.backward(found) - points
            if not np.abs(error).max(initial=0.0) > _EXACT / 10:
                break
            found = found - np.linalg.solve(self.jacobian(found), error[:, :, None])[:, :, 0]
        error = np.abs(self.backward(found) - points).max(axis=1)
        return np.where(error[:, None] <= _EXACT, found, np.nan)


def _kernel(squares: _Array) -> _Array:
    kernel: _Array = squares * np.log(np.maximum(squares, 1e-300))
    return kernel


def random_homography(rng: np.random.Generator, size: Size, strength: float) -> Homography:
    """Draw a turn, a scale and moves of the corners by up to ``strength`` (below 0.25) of the shorter side."""
    ends = np.array(size, np.float64) - 1  # the last pixel's centre
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * ends  # (4, 2)
    angle, zoom = rng.uniform(-2, 2) * strength, np.exp(rng.uniform(-1, 1) * strength)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (corners - ends / 2) @ turn.T + ends / 2 + rng.uniform(-1, 1, (4, 2)) * strength * min(size) / 2
    rows = []  # the linear system of the direct linear transform: two equations per corner, with H[2, 2] = 1
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solved = np.linalg.solve(np.array(rows), moved.ravel())
    return Homography(np.append(solved, 1.0).reshape(3, 3))


def random_thin_plate(rng: np.random.Generator, size: Size, strength: float) -> ThinPlate:
    """Draw a spline with 4 x 4 control points, each moved by up to ``strength`` / 2 of the shorter side in x and y.

    A spline that would fold is drawn with smaller moves, because a fold has no inverse.
    """
    across, down = (np.linspace(0, side - 1, 4) for side in size)
    controls = np.stack(np.meshgrid(across, down), axis=2).reshape(-1, 2)
    offsets = rng.uniform(-0.5, 0.5, controls.shape) * strength * min(size)
    dense = np.stack(np.meshgrid(*(np.linspace(0, side - 1, 33) for side in size)), axis=2).reshape(-1, 2)
    while True:
        plate = ThinPlate.fit(controls, offsets, float(max(size)))
        if np.linalg.det(plate.jacobian(dense)).min() > _FOLD:
            return plate
        offsets = offsets * 0.7


# ---- drawing: resample under a warp, recolour, cover, save

_GREY = 127.0  # the target's colour where the source has no pixel
_ROWS = 64  # rows drawn at once, which bounds the memory


def resample(pixels: NDArray[np.uint8], warp: Warp) -> NDArray[np.float64]:
    """Draw the target ``(H, W, 3)`` of a warp by bilinear interpolation; grey where the source has no pixel."""
    height, width = pixels.shape[:2]
    drawn = np.full((height, width, 3), _GREY)
    for top in range(0, height, _ROWS):
        ys, xs = np.mgrid[top : min(top + _ROWS, height), 0:width]
        origin = warp.backward(np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float64))
        ends = np.array([width - 1, height - 1])
        inside = ((origin >= 0) & (origin <= ends)).all(axis=1)  # False for NaN
        x, y = origin[inside].T
        # One less at the last column and row, so that the neighbour x0 + 1 exists; its weight is then 1.
        x0, y0 = np.minimum(x.astype(np.int64), width - 2), np.minimum(y.astype(np.int64), height - 2)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        upper = pixels[y0, x0] * (1 - fx) + pixels[y0, x0 + 1] * fx
        lower = pixels[y0 + 1, x0] * (1 - fx) + pixels[y0 + 1, x0 + 1] * fx
        drawn[top : top + _ROWS].reshape(-1, 3)[inside] = upper * (1 - fy) + lower * fy
    return drawn


def recolour(pixels: NDArray[np.float64], rng: np.random.Generator, strength: float) -> NDArray[np.uint8]:
    """Change gamma, contrast, brightness and the balance of the channels, and add noise.

    Args:
        pixels: ``(H, W, 3)``, 0 to 255.
        rng: the source of randomness.
        strength: 0 changes nothing; 1 is the strongest change meant.
    """
    gamma, contrast = np.exp(rng.uniform(-1, 1, 2) * strength)
    brightness = rng.uniform(-0.5, 0.5) * strength
    balance = np.exp(rng.uniform(-0.5, 0.5, 3) * strength)
    noise = rng.standard_normal(pixels.shape) * 0.05 * strength
    values = (np.clip(pixels / 255.0, 0, 1) ** gamma - 0.5) * contrast * balance + 0.5 + brightness + noise
    coloured: NDArray[np.uint8] = np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8)
    return coloured


def occlude(pixels: NDArray[np.uint8], rng: np.random.Generator, patches: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Cover the patches ``(P, 4)`` (x1, y1, x2, y2 in pixels, ends excluded) with 8x8 squares of random colours."""
    covered = pixels.copy()
    for x1, y1, x2, y2 in patches:
        coarse = rng.integers(0, 256, ((y2 - y1) // 8 + 1, (x2 - x1) // 8 + 1, 3), np.uint8)
        covered[y1:y2, x1:x2] = coarse.repeat(8, axis=0).repeat(8, axis=1)[: y2 - y1, : x2 - x1]
    return covered


# ---- how targets are made: the settings, and the plan of one target

KINDS: dict[str, Callable[[np.random.Generator, Size, float], Warp]] = {
    "homography": random_homography,
    "thin-plate": random_thin_plate,
}
_VERSION = 1
"""A part of every target's key; raise it when the drawing changes, so that old targets are not reused."""
_PATCHES = 3  # covering patches per target


@dataclass(frozen=True)
class Distortion:
    """How targets are made from sources; equal settings make equal pixels.

    Attributes:
        seed: seed of everything random. Each image and kind of warp has its own random stream, so that a target does
            not depend on what else is in the folder.
        kinds: the warps that each image gets: ``homography``, ``thin-plate``.
        grid: keypoints are ``grid`` x ``grid`` pixel centres of the source.
        strength: how far the warp moves points, as a fraction of the shorter side; below 0.25.
        occlusion: the largest fraction of the target that three patches of random colours may cover; below 0.9.
        photometric: strength of the change of colour, from 0 (none) to 1.

    Raises:
        InputError: a value is out of bounds.
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
class WarpedTarget:
    """One target to make.

    Attributes:
        distortion: the settings.
        kind: the kind of warp, a key of `KINDS`.
        file: the source's file.
        digest: SHA-256 of that file.
    """

    distortion: Distortion
    kind: str
    file: Path
    digest: str

    @property
    def key(self) -> str:
        """A digest of everything that decides the target's pixels: its name in the cache and its random seed."""
        d = self.distortion
        parts = (_VERSION, d.seed, float(d.strength), float(d.occlusion), float(d.photometric), self.kind, self.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def plan(self, size: Size) -> tuple[Warp, NDArray[np.int64], np.random.Generator]:
        """Draw the warp and the covering patches.

        Returns:
            the warp; the patches ``(P, 4)`` (x1, y1, x2, y2 in pixels, ends excluded); the random generator, for the
            colours that are drawn next.
        """
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


def keypoints(making: WarpedTarget, size: Size) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the keypoints that are visible in the target: ``(N, 2)`` in the source and ``(N, 2)`` in the target."""
    warp, patches, _ = making.plan(size)
    grid = making.distortion.grid
    xs, ys = (np.unique(np.floor((np.arange(grid) + 0.5) * side / grid)) for side in size)
    source = np.stack(np.meshgrid(xs, ys), axis=2).reshape(-1, 2)
    target = warp.forward(source)
    inside = ((target >= 0) & (target <= np.array(size) - 1)).all(axis=1)  # False for NaN
    in_patch = (target[:, None] >= patches[:, :2] - 0.5) & (target[:, None] <= patches[:, 2:] - 0.5)  # (N, P, 2)
    in_patch &= (patches[:, 2:] > patches[:, :2])[None]  # else a patch without area would cover its corner
    covered = np.asarray(in_patch.all(axis=2), np.bool_)  # (N, P)
    seen = inside & ~covered.any(axis=1)
    return source[seen], target[seen]


# ---- the data set

SPLITS = ("all",)
TREE: Tree = (("**/*.*", "JPEG, PNG and other pictures, at any depth; an image's folder is its class"),)
_SMALLEST = 16  # pixels of the shorter side


def variants(root: Path) -> Iterator[dict[str, str]]:
    """Yield the options of the one split, if there is such a folder."""
    if root.is_dir():
        yield {"split": "all"}


def load(
    root: Path,
    *,
    split: str = "all",
    distortion: Distortion | None = None,
    limit: int | None = None,
    allow_missing: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Make pairs from a folder's images. Source and target have the same size; the box of each is the whole image.

    Args:
        root: a folder of images, read at any depth, in order of name. Files in ``cache`` and files that benchmark
            runs wrote are not read.
        split: ``all``.
        distortion: how targets are made.
        limit: images to take, spread evenly over the folder; all by default.
        allow_missing: leave unusable images out, and count them, instead of refusing the folder.
        cache: the folder for targets; a target is written when its pair is first taken from the data set.

    Raises:
        DatasetError: the folder does not exist, holds no images, or holds broken images.
        InputError: ``limit`` is below 1, or ``cache`` is ``root`` itself.
    """
    one_of("split", split, SPLITS)
    require_files("synthetic", root, TREE)
    if cache is None:
        raise DatasetError("the synthetic data set writes images; give cache, a folder for them")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; allowed: 1 or more images")
    # Leave out what benchmark runs wrote below the root (targets, plots, galleries): such a folder has this file.
    runs = {path.parent for path in walk_folder(root) if path.name == "predictions.jsonl"} - {root}
    scan = FolderScan.of(root, without=runs | ({cache} if cache.is_relative_to(root) else set()))
    files = [path for path in scan.pictures if runs.isdisjoint(path.parents)]
    if cache.resolve() == root.resolve():
        raise InputError(f"cache is '{cache}', the folder of the images itself; give another one for what is made")
    if cache.resolve().is_relative_to(root.resolve()):
        files = [path for path in files if not path.resolve().is_relative_to(cache.resolve())]
    if not files:
        raise DatasetError(f"no images in '{root}'; give a folder of images", draw_tree(root, TREE))
    count = min(limit or len(files), len(files))
    collector = Collector("synthetic", split, root)
    if scan.left_out:
        collector.unused.append(scan.left_out)
    for file in (files[k * len(files) // count] for k in range(count)):
        for kind in (distortion or Distortion()).kinds:
            with collector.pair(f"{file.relative_to(root).as_posix()}:{kind}"):
                collector.add(_sample(collector, root, file, cache, distortion or Distortion(), kind))
    return collector.finish(allow_missing)


def _sample(collector: Collector, root: Path, file: Path, cache: Path, distortion: Distortion, kind: str) -> Sample:
    """Pair an image with one of its warps."""
    width, height = size = collector.size(file)
    if min(size) < _SMALLEST:
        raise BadPairError(
            "malformed", f"'{file}' is {width}x{height}; allowed: {_SMALLEST} pixels a side or more", file
        )
    making = WarpedTarget(distortion, kind, file, collector.document(file, file_digest))
    source, target = keypoints(making, size)
    made = cache / f"{file.stem}-{kind}-{making.key[:16]}.png"
    collector.generators[made] = lambda: making.draw(made)
    place = file.relative_to(root)
    ids = tuple(f"{x:.0f},{y:.0f}" for x, y in source)
    box = (0.0, 0.0, float(width), float(height))
    return Sample(
        name=f"{place.as_posix()}:{kind}",
        source=file,
        target=made,
        category=place.parent.as_posix() if len(place.parts) > 1 else "all",
        source_points=source,
        target_points=target,
        keypoint_ids=ids,
        target_visible=target,
        target_ids=ids,
        source_size=size,
        target_size=size,
        source_box=box,
        target_box=box,
    )
