"""Two images matched: what a recipe asks for, an image made ready, and points led from one to the other.

- ``combine``: ``concat`` joins an image's maps into one; ``score-sum`` and ``score-product`` keep them apart, so that
  the joined map is never stored (`difftap.matching.descriptors`). A single map is a list of one under any law.
- ``reading``: ``centres``, difftap's half-pixel rule; or ``corners``, SD4Match's (`difftap.coords.CornerGeometry`).

Axis letters: N points; C channels; W H image pixels; w h cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

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

_BLOCK = 256  # points whose descriptors are held at once


@dataclasses.dataclass(frozen=True)
class MatchRule:
    """How an image's maps become one thing to match.

    Attributes:
        matcher: the recipe's.
        shares: one a map.
        upsample: how coarse maps are brought to the finest grid.
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
        """Take what a recipe asks for; ``combining`` takes the place of its own.

        ``mutual`` compares all cells with all, for which sums of scores are made of the joined map.

        Raises:
            InputError: a name is unknown, or the matcher and the way of combining or reading exclude each other.
        """
        shares = [branch.weight / len(branch.taps) for branch in recipe.branches for _ in branch.taps]
        chosen = combining or recipe.combine
        if recipe.matcher.name == "mutual" and chosen == "score-sum":
            chosen = "concat"
        if reading == "corners" and recipe.fit != "stretch":
            raise InputError(f"reading by corners needs a stretched image; the recipe's fit is '{recipe.fit}'")
        return cls(recipe.matcher, tuple(shares), recipe.upsample, chosen, reading)

    @property
    def apart(self) -> bool:
        """Whether the maps are kept apart."""
        return self.combine != "concat" and len(self.shares) > 1

    def fuse(self, maps: Sequence[FeatureMap]) -> tuple[FeatureMap, ...]:
        """Choose what is kept of an image's maps: all, or the joined one."""
        if self.reading == "corners":
            geometry = maps[0].geometry
            corners = CornerGeometry(geometry.image, geometry.input, geometry.content)
            maps = [FeatureMap(one.data, corners) for one in maps]
        return tuple(maps) if self.apart else (combine(list(maps), self.shares, self.upsample),)

    def prepare(self, fused: Sequence[FeatureMap]) -> PreparedImage:
        """Make what was kept ready for matching; costly steps are taken when first needed."""
        return PreparedImage(fused, self)


class PreparedImage:
    """An image made ready: source and target of any number of matches, all of one `MatchRule`.

    Args:
        maps: what `MatchRule.fuse` gave.
        rule: how they become one thing to match.
    """

    def __init__(self, maps: Sequence[FeatureMap], rule: MatchRule) -> None:
        self._maps = tuple(maps)
        self._rule = rule
        self._matcher = rule.matcher

    @cached_property
    def descriptors(self) -> tuple[Descriptors, ...]:
        """One, or several whose cosines are multiplied."""
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
        """Memory in bytes of what was made beside the maps, so far."""
        made = self.__dict__  # of cached properties, only those that were asked for
        descriptors: tuple[Descriptors, ...] = made.get("descriptors", ())
        dense: DenseTarget | None = made.get("_dense")
        return sum(one.nbytes for one in descriptors) + (0 if dense is None else dense.nbytes)

    def match(self, target: PreparedImage, points: ArrayLike, confidence: bool = True) -> Matches:
        """Find where points of this image lie on the target; the rules are at `match_points`.

        Args:
            target: made ready by an equal `MatchRule`.
            points: ``(N, 2)`` pixels ``(x, y)`` of this image, fractional allowed.
            confidence: also compute margin and cycle error, at about twice the cost.

        Raises:
            PointError: a point is not finite or not on this image.
            InputError: the maps have different channel counts or hold NaN, or the images were made ready differently.
        """
        self._check(target)
        xy = check_points(points, self.image_size)
        if not len(xy):
            return Matches(xy, np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros(0))
        pixels, score, margin = self._lead(target, xy, confidence)
        error = np.full(len(xy), np.nan)
        matched = np.isfinite(pixels).all(axis=1)
        if confidence and matched.any():
            error[matched] = cycle_error(xy[matched], target._lead(self, pixels[matched], False)[0])
        return Matches(xy, pixels, score, margin, error)

    def mutual(self, target: PreparedImage) -> Matches:
        """Find matches without being given points; the rules are at `mutual_matches`.

        Raises:
            InputError: as `match`, or the branches' cosines are multiplied, which leaves no vectors to compare.
        """
        self._check(target)
        cells, peaks, score, margin = mutual_cells(self._grid, target._grid)
        points, found = self._centres(cells), target._centres(peaks)
        error = np.zeros(len(cells))
        if self._matcher.name not in ("mutual", "nn"):  # under these the way back is known already
            error = cycle_error(points, target._lead(self, found, False)[0])
        return Matches(points, found, score, margin, error)

    def heat(self, target: PreparedImage, point: ArrayLike) -> NDArray[np.float32]:
        """Score one of this image's points against every pixel of the target, ``(H, W)``, for a picture.

        Pixels are read with the matcher's interpolation, whichever matcher it is.

        Raises:
            PointError: the point is not one, not finite or not on this image.
            InputError: as `match`.
        """
        self._check(target)
        one: Any = [point]  # a list of one point, whatever kind of pair it is
        xy = check_points(one, self.image_size)
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
                f"the images were made ready differently: {self._rule} and {target._rule}; use one for both"
            )

    def _cells(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        one = self.descriptors[0]
        return one.geometry.to_cells(points, one.grid)

    def _pixels(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cells ``(N, 2)`` as pixels: inside the image, but by corners as SD4Match leaves them."""
        one = self.descriptors[0]
        pixels = one.geometry.to_pixels(cells, one.grid)
        return pixels if self._rule.reading == "corners" else clip_to_image(pixels, self.image_size)

    def _centres(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Centres ``(N, 2)`` in pixels of cells given by row-major index."""
        y, x = np.divmod(indices, self.descriptors[0].grid[0])
        return self._pixels(np.stack([x, y], axis=1).astype(np.float64))

    def _read(self, cells: NDArray[np.float64], interpolation: str) -> list[NDArray[np.float64]]:
        return [one.read(cells, interpolation) for one in self.descriptors]

    def _lead(
        self, target: PreparedImage, points: NDArray[np.float64], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Pixels ``(N, 2)``, scores and margins ``(N,)`` of where points ``(N, 2)`` of this image match."""
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


def check_points(points: ArrayLike, size: Size) -> NDArray[np.float64]:
    """Take points as float64 ``(N, 2)``, all on an image of ``(W, H)`` pixels.

    Raises:
        PointError: not numbers, not pairs, not finite, or outside the image.
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
    cosine (`difftap.matching.dense`). The others choose or average cells and return fractional pixels. ``mutual`` moves
    the point to its nearest cell and matches it only if the cell found leads back there.

    For many calls with the same maps make them ready once: ``MatchRule(matcher).prepare([features])``.

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
    """Find matches without points: cells of the two maps that are each other's nearest neighbour, best score first.

    Points are the cells' centres, clipped into the images; cells that show only letterbox padding take no part.

    Args:
        source: the source image's map.
        target: the target image's map.
        matcher: finds the way back from each target point for the cycle error. With ``mutual`` or ``nn`` it repeats
            what is known already; ``dense`` judges the pair to the pixel.

    Raises:
        InputError: the maps have different channel counts or hold NaN.
    """
    rule = MatchRule(matcher)
    return rule.prepare([source]).mutual(rule.prepare([target]))


def heat_map(source: FeatureMap, target: FeatureMap, point: ArrayLike, matcher: Matcher) -> NDArray[np.float32]:
    """Give the cosine of one source point with every pixel of the target's image, ``(H, W)``, for a picture.

    Pixels are read with the matcher's interpolation, whichever matcher it is.

    Raises:
        PointError: the point is not finite or not on the source image.
        InputError: as `match_points`.
    """
    rule = MatchRule(matcher)
    return rule.prepare([source]).heat(rule.prepare([target]), point)


def find(
    source: PreparedImage, target: PreparedImage, points: NDArray[np.float64], size: Size, confidence: bool = True
) -> tuple[Matches, int]:
    """Match a pair's keypoints; those outside the source image are read at its border, and counted.

    Args:
        source: the source image.
        target: the target image.
        points: ``(N, 2)`` source pixels, as annotated.
        size: ``(W, H)`` of the source image.
        confidence: also margin and cycle error.

    Returns:
        matches whose ``source`` is as annotated, and how many points were moved.
    """
    inside = np.clip(points, -0.5, np.array(size, np.float64) - 0.5)
    matches = source.match(target, inside, confidence)
    return dataclasses.replace(matches, source=points), int((inside != points).any(axis=1).sum())
