"""Known warps of an image: homographies and thin-plate splines, with their inverses.

A warp takes points of the target ``backward`` to the source, which is how the target is drawn, and points of the source
``forward`` to the target, which is the ground truth. Points are ``(N, 2)``, x and y in pixels (`difftap.coords`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size

__all__ = ["Homography", "ThinPlate", "Warp", "random_homography", "random_thin_plate"]

_Array = NDArray[np.float64]
_STEPS, _EXACT = 50, 1e-9  # Newton's iterations at most; the pixels that its result may be off by
_FOLD = 0.2  # least local area scale of a spline, source over target: below it the sheet is about to fold


class Warp(Protocol):
    """A map between two images, both ways."""

    def backward(self, points: _Array) -> _Array:
        """Where points of the target come from in the source."""

    def forward(self, points: _Array) -> _Array:
        """Where points of the source go in the target; NaN for one that goes nowhere."""


def _project(matrix: _Array, points: _Array) -> _Array:
    moved = points @ matrix[:, :2].T + matrix[:, 2]  # (N, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(moved[:, 2:] > 0, moved[:, :2] / moved[:, 2:], np.nan)  # beyond the horizon is nowhere


@dataclass(frozen=True, eq=False)
class Homography:
    """A plane seen from elsewhere: ``matrix`` (3, 3) takes source to target, and is positive on the source."""

    matrix: _Array

    def forward(self, points: _Array) -> _Array:
        """Where points of the source go in the target."""
        return _project(self.matrix, points)

    def backward(self, points: _Array) -> _Array:
        """Where points of the target come from in the source."""
        inverse = np.linalg.inv(self.matrix)
        return _project(inverse / inverse[2, 2], points)


@dataclass(frozen=True, eq=False)
class ThinPlate:
    """A bent sheet: ``backward(t) = t + affine([1, t]) + sum_k weights_k U(|t - controls_k|)``, U(r) = r^2 log r^2.

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
        """The spline that moves each control point ``(K, 2)`` of the target by its offset ``(K, 2)``, in pixels."""
        units, count = controls / scale, len(controls)
        system = np.zeros((count + 3, count + 3))
        system[:count, :count] = _kernel(((units[:, None] - units[None]) ** 2).sum(axis=2))
        system[:count, count:] = np.column_stack([np.ones(count), units])
        system[count:, :count] = system[:count, count:].T
        solved: _Array = np.linalg.solve(system, np.vstack([offsets / scale, np.zeros((3, 2))])).astype(np.float64)
        return cls(units, solved[:count], solved[count:], scale)

    def backward(self, points: _Array) -> _Array:
        """Where points of the target come from in the source."""
        units = points / self.scale
        squares = ((units[:, None] - self.controls[None]) ** 2).sum(axis=2)  # (N, K)
        moved: _Array = units + self.affine[0] + units @ self.affine[1:] + _kernel(squares) @ self.weights
        return moved * self.scale

    def jacobian(self, points: _Array) -> _Array:
        """Derivative of `backward`, ``(N, 2, 2)``: axis 1 the source's x and y, axis 2 the target's."""
        units = points / self.scale
        apart = units[:, None] - self.controls[None]  # (N, K, 2)
        squares = (apart**2).sum(axis=2)
        slope = 2 * (np.log(np.maximum(squares, 1e-300)) + 1)  # dU/dt = slope * apart, and 0 where both vanish
        bend = np.einsum("nk,nkj,ki->nij", slope, apart, self.weights)
        derivative: _Array = np.eye(2) + self.affine[1:].T + bend
        return derivative

    def forward(self, points: _Array) -> _Array:
        """Where points of the source go in the target, by Newton's method; NaN where it does not arrive."""
        found = points - (self.backward(points) - points)
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
    """A turn, a change of scale and a move of each corner by up to ``strength`` (below 0.25) of the shorter side."""
    ends = np.array(size, np.float64) - 1
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * ends  # (4, 2)
    angle, zoom = rng.uniform(-2, 2) * strength, np.exp(rng.uniform(-1, 1) * strength)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (corners - ends / 2) @ turn.T + ends / 2 + rng.uniform(-1, 1, (4, 2)) * strength * min(size) / 2
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solved = np.linalg.solve(np.array(rows), moved.ravel())
    return Homography(np.append(solved, 1.0).reshape(3, 3))


def random_thin_plate(rng: np.random.Generator, size: Size, strength: float) -> ThinPlate:
    """A spline on 4 x 4 points, each moved by up to ``strength`` / 2 of the shorter side, less if it would fold."""
    across, down = (np.linspace(0, side - 1, 4) for side in size)
    controls = np.stack(np.meshgrid(across, down), axis=2).reshape(-1, 2)
    offsets = rng.uniform(-0.5, 0.5, controls.shape) * strength * min(size)
    dense = np.stack(np.meshgrid(*(np.linspace(0, side - 1, 33) for side in size)), axis=2).reshape(-1, 2)
    while True:
        plate = ThinPlate.fit(controls, offsets, float(max(size)))
        if np.linalg.det(plate.jacobian(dense)).min() > _FOLD:
            return plate
        offsets = offsets * 0.7
