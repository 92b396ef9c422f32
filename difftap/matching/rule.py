"""Matching two images: the rule that a recipe asks for, images prepared for it, and points matched between them.

- ``combine``: ``concat`` joins an image's maps into one; ``score-sum`` and ``score-product`` keep them apart, so that
  the joined map is never stored (`difftap.matching.descriptors`). A single map is the same under each of them.
- ``reading``: where cells lie. ``centres`` is difftap's half-pixel rule; ``corners`` is SD4Match's rule
  (`difftap.coords.CornerGeometry`).

Axis letters: N points; C channels; W H image pixels; w h cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.coords import CornerGeometry, Size
from difftap.errors import InputError, PointError
from difftap.featuremap import FeatureMap
from difftap.matching.confidence import cycle_error
from difftap.matching.dense import DenseTarget
from difftap.matching.descriptors import Descriptors, combine, describe
from difftap.matching.grid import Corners, GridTarget, clip_to_image
from difftap.matching.matches import Matches
from difftap.matching.mutual import agreed_cells, mutual_cells
from difftap.points import check_inside
from difftap.recipe import COMBINES, Matcher, Recipe

__all__ = [
    "READINGS",
    "MatchRule",
    "PreparedImage",
    "check_points",
    "find",
    "heat_map",
    "match_points",
    "mutual_matches",
]

READINGS = ("centres", "corners")

_BLOCK = 256  # points whose descriptors are in memory at once


@dataclasses.dataclass(frozen=True)
class MatchRule:
    """How an image's maps are matched as one.

    Attributes:
        matcher: the recipe's.
        shares: one per map; they need not sum to 1.
        upsample: how coarse maps are resized to the finest grid: ``bilinear`` or ``bicubic``.
        combine: one of `COMBINES`.
        reading: one of `READINGS`.
    """

    matcher: Matcher
    shares: tuple[float, ...] = (1.0,)
    upsample: str = "bicubic"
    combine: str = "concat"
    reading: str = "centres"

    def __post_init__(self) -> None:
        for what, got, allowed in (("combine", self.combine, COMBINES), ("reading", self.reading, READINGS)):
            if got not in allowed:
                raise InputError(f"{what} is {got!r}; allowed: {', '.join(allowed)}")
        if self.matcher.name == "mutual" and (self.apart or self.reading != "centres"):
            raise InputError(
                "matcher 'mutual' needs one joined map read by centres; combine the branches by concat or score-sum"
            )

    @classmethod
    def of(cls, recipe: Recipe, combining: str | None = None, reading: str = "centres") -> MatchRule:
        """Make the rule of a recipe.

        Args:
            recipe: matcher, shares of its branches, and how they are combined.
            combining: one of `COMBINES` to use instead of the recipe's; None for the recipe's.
            reading: one of `READINGS`.

        Raises:
            InputError: a name is unknown, or the matcher does not work with the way of combining or reading.
        """
        # A branch's share is divided evenly among its taps.
        shares = [branch.weight / len(branch.taps) for branch in recipe.branches for _ in branch.taps]
        chosen = combining or recipe.combine
        if recipe.matcher.name == "mutual" and chosen == "score-sum":
            chosen = "concat"  # gives the same scores, and mutual compares all cells with all: it needs joined vectors
        if reading == "corners" and recipe.fit != "stretch":
            raise InputError(f"reading by corners needs a stretched image; the recipe's fit is '{recipe.fit}'")
        return cls(recipe.matcher, tuple(shares), recipe.upsample, chosen, reading)

    @property
    def apart(self) -> bool:
        """Whether the maps are kept apart."""
        return self.combine != "concat" and len(self.shares) > 1

    def fuse(self, maps: Sequence[FeatureMap]) -> tuple[FeatureMap, ...]:
        """Give the maps to keep for an image: all of them, or the joined one."""
        if self.reading == "corners":
            geometry = maps[0].geometry
            corners = CornerGeometry(geometry.image, geometry.input, geometry.content)
            maps = [FeatureMap(one.data, corners) for one in maps]
        return tuple(maps) if self.apart else (combine(list(maps), self.shares, self.upsample),)

    def prepare(self, fused: Sequence[FeatureMap]) -> PreparedImage:
        """Prepare an image, from what `fuse` gave, for matching; costly steps wait until they are first needed."""
        return PreparedImage(fused, self)


class PreparedImage:
    """An image prepared for matching: source or target of any number of matches, all under one `MatchRule`.

    Args:
        maps: what `MatchRule.fuse` gave.
        rule: how they are matched as one.
    """

    def __init__(self, maps: Sequence[FeatureMap], rule: MatchRule) -> None:
        self._maps = tuple(maps)
        self._rule = rule
        self._matcher = rule.matcher

    @cached_property
    def descriptors(self) -> tuple[Descriptors, ...]:
        """One descriptor, or several whose cosines are multiplied."""
        weights = self._rule.shares if len(self._maps) > 1 else (1.0,)
        return describe(self._maps, weights, self._rule.upsample, self._rule.combine)

    @cached_property
    def _dense(self) -> DenseTarget:
        return DenseTarget(self.descriptors, self._matcher.interpolation)

    @cached_property
    def _grid(self) -> GridTarget:
        return GridTarget(self.descriptors, self._matcher)

    @property
    def image_size(self) -> Size:
        """``(W, H)`` of the image in pixels."""
        return self._maps[0].geometry.image

    @property
    def nbytes(self) -> int:
        """Memory of what was made from the maps so far, in bytes; the maps themselves do not count."""
        made = self.__dict__  # holds a cached property only once it was asked for
        descriptors: tuple[Descriptors, ...] = made.get("descriptors", ())
        dense: DenseTarget | None = made.get("_dense")
        return sum(one.nbytes for one in descriptors) + (0 if dense is None else dense.nbytes)

    def match(self, target: PreparedImage, points: ArrayLike, confidence: bool = True) -> Matches:
        """Find where points of this image lie on the target; see `match_points` for how.

        Args:
            target: prepared by an equal `MatchRule`.
            points: ``(N, 2)`` pixels ``(x, y)`` of this image, fractional allowed.
            confidence: also compute margin and cycle error, at about twice the cost.

        Raises:
            PointError: a point is not finite or not on this image.
            InputError: the maps have different channel counts or hold NaN, or the images were prepared differently.
        """
        self._check(target)
        xy = check_points(points, self.image_size)
        if not len(xy):  # numpy takes no maximum over nothing
            return Matches(xy, np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros(0))
        pixels, score, margin = self._lead(target, xy, confidence)
        error = np.full(len(xy), np.nan)
        matched = np.isfinite(pixels).all(axis=1)
        if confidence and matched.any():
            error[matched] = cycle_error(xy[matched], target._lead(self, pixels[matched], False)[0])
        return Matches(xy, pixels, score, margin, error)

    def mutual(self, target: PreparedImage) -> Matches:
        """Find matches without given points; see `mutual_matches` for how.

        Raises:
            InputError: as `match`; or the branches' cosines are multiplied, so there are no vectors to compare.
        """
        self._check(target)
        cells, peaks, score, margin = mutual_cells(self._grid, target._grid)
        points, found = self._centres(cells), target._centres(peaks)
        error = np.zeros(len(cells))
        if self._matcher.name not in ("mutual", "nn"):  # these match back to the same cell, so the error is 0
            error = cycle_error(points, target._lead(self, found, False)[0])
        return Matches(points, found, score, margin, error)

    def heat(self, target: PreparedImage, point: ArrayLike) -> NDArray[np.float32]:
        """Score one point of this image at every pixel of the target, ``(H, W)``, for a picture.

        Pixels are read with the matcher's interpolation, even if the matcher itself works on cells.

        Raises:
            PointError: the point is not one, not finite or not on this image.
            InputError: as `match`.
        """
        self._check(target)
        xy = check_points([point], self.image_size)
        if len(xy) != 1:
            raise PointError("no point was given for the heat map; give one (x, y) in source pixels")
        return target._dense.heat(self._read(self._cells(xy), self._matcher.interpolation)).astype(np.float32)

    def _check(self, target: PreparedImage) -> None:
        ours, theirs = (sum(m.channels for m in one._maps) for one in (self, target))
        if ours != theirs:
            raise InputError(
                f"the source map has {ours} channels and the target map {theirs}; match maps of the same taps and model"
            )
        if self._rule != target._rule:
            raise InputError(
                f"the images were prepared under different rules: {self._rule} and {target._rule}; use one for both"
            )

    def _cells(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        one = self.descriptors[0]
        return one.geometry.to_cells(points, one.grid)

    def _pixels(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert cells ``(N, 2)`` to pixels: clipped into the image by ``centres``, not clipped by ``corners``."""
        one = self.descriptors[0]
        pixels = one.geometry.to_pixels(cells, one.grid)
        return pixels if self._rule.reading == "corners" else clip_to_image(pixels, self.image_size)

    def _centres(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the centres, in pixels ``(N, 2)``, of cells named by row-major index ``(N,)``."""
        y, x = np.divmod(indices, self.descriptors[0].grid[0])
        return self._pixels(np.stack([x, y], axis=1).astype(np.float64))

    def _read(self, cells: NDArray[np.float64], interpolation: str) -> list[NDArray[np.float64]]:
        return [one.read(cells, interpolation) for one in self.descriptors]

    def _lead(
        self, target: PreparedImage, points: NDArray[np.float64], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Match points ``(N, 2)`` of this image: give pixels ``(N, 2)``, scores and margins ``(N,)``."""
        name = self._matcher.name
        grid = None if name == "dense" else target._grid
        home = self._grid if name == "mutual" else None
        parts = []
        for start in range(0, len(points), _BLOCK):
            cells = self._cells(points[start : start + _BLOCK])
            if grid is None:
                peaks = target._dense.find(self._read(cells, self._matcher.interpolation), margin)
                parts.append((peaks.pixels, peaks.score, peaks.margin))
                continue
            if home is not None:
                found, score, margins = agreed_cells(home, grid, cells, margin)
            else:
                corners = Corners.around(self.descriptors, cells) if name == "bilinear" else None
                found, score, margins = grid.find(self._read(cells, "bilinear"), margin, corners)
            parts.append((target._pixels(found), score, margins))
        pixels, score, margins = (np.concatenate(each) for each in zip(*parts, strict=True))
        return pixels, score, margins


def check_points(points: ArrayLike | Sequence[ArrayLike], size: Size) -> NDArray[np.float64]:
    """Convert points to float64 ``(N, 2)``, if all of them lie on the source image of ``(W, H)`` pixels.

    Raises:
        PointError: they are not numbers, not pairs, not finite, or lie outside the image.
    """
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise PointError(f"points are not numbers ({error}); give an array (N, 2) of x, y in pixels") from error
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2:
        raise PointError(f"points have shape {array.shape}; give (N, 2): x, y in pixels")
    return check_inside(array, size, "the source image")


def match_points(
    source: FeatureMap, target: FeatureMap, points: ArrayLike, matcher: Matcher, *, confidence: bool = True
) -> Matches:
    """Find where points of the source image lie on the target image.

    ``dense`` returns whole pixels: the same ones as enlarging both maps to image size, normalising and taking the best
    cosine (`difftap.matching.dense`). The other matchers choose or average cells and return fractional pixels.
    ``mutual`` moves the point to its nearest cell, and matches it only if the cell it finds matches back to that cell.

    For many calls with the same maps, prepare them once: ``MatchRule(matcher).prepare([features])``.

    Args:
        source: the source image's map.
        target: the target image's map.
        points: ``(N, 2)`` source pixels ``(x, y)``, fractional allowed.
        matcher: the rule.
        confidence: also compute margin and cycle error, at about twice the cost.

    Raises:
        PointError: a point is not finite or not on the source image.
        InputError: the maps have different channel counts or hold NaN.
    """
    rule = MatchRule(matcher)
    return rule.prepare([source]).match(rule.prepare([target]), points, confidence)


def mutual_matches(source: FeatureMap, target: FeatureMap, matcher: Matcher) -> Matches:
    """Find matches without given points: cells of the two maps that are each other's nearest neighbour.

    The best score comes first. Points are the cells' centres, clipped into the images; cells that show only letterbox
    padding are left out.

    Args:
        source: the source image's map.
        target: the target image's map.
        matcher: matches each target point back, for the cycle error. For ``mutual`` and ``nn`` that error is 0, since
            the cells match each other; ``dense`` measures it to the pixel.

    Raises:
        InputError: the maps have different channel counts or hold NaN.
    """
    rule = MatchRule(matcher)
    return rule.prepare([source]).mutual(rule.prepare([target]))


def heat_map(source: FeatureMap, target: FeatureMap, point: ArrayLike, matcher: Matcher) -> NDArray[np.float32]:
    """Compute the cosine of one source point with every pixel of the target image, ``(H, W)``, for a picture.

    Pixels are read with the matcher's interpolation, even if the matcher itself works on cells.

    Raises:
        PointError: the point is not finite or not on the source image.
        InputError: as `match_points`.
    """
    rule = MatchRule(matcher)
    return rule.prepare([source]).heat(rule.prepare([target]), point)


def find(
    source: PreparedImage, target: PreparedImage, points: NDArray[np.float64], size: Size, confidence: bool = True
) -> tuple[Matches, int]:
    """Match a pair's keypoints. Those outside the source image are moved to its border, and counted.

    Args:
        source: the source image.
        target: the target image.
        points: ``(N, 2)`` source pixels, as annotated.
        size: ``(W, H)`` of the source image.
        confidence: also compute margin and cycle error.

    Returns:
        matches whose ``source`` are the points as annotated, and the number of points that were moved.
    """
    # Data sets hold a few keypoints just outside their images; evaluation counts them, so they must be matched.
    inside = np.clip(points, -0.5, np.array(size, np.float64) - 0.5)
    matches = source.match(target, inside, confidence)
    return dataclasses.replace(matches, source=points), int((inside != points).any(axis=1).sum())
