"""Images made ready for matching: branches joined or kept apart, read by cell centres or by corners.

- ``combine``: ``concat`` joins the branches into one map; ``score-sum`` and ``score-product`` keep them apart
  (`difftap.matching.fused`), so that the joined map is never stored.
- ``reading``: ``centres``, difftap's half-pixel rule; or ``corners``, SD4Match's: the image is stretched to the
  input's square and ``x_f = x (w - 1) / (W - 1)`` takes its pixels to cells, so that corners fall on corners.

Axis letters: N points; C channels; W H image pixels; w h cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.coords import Geometry, Size
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.matching.combine import combine
from difftap.matching.confidence import cycle_error
from difftap.matching.dense import DenseTarget
from difftap.matching.grid import Corners, GridTarget
from difftap.matching.interpolate import sample, unit
from difftap.matching.points import Matches, heat_map, match_points, mutual_matches
from difftap.recipe import COMBINES, Matcher, Recipe

__all__ = ["READINGS", "CornerGeometry", "Joining", "Ready", "find"]

READINGS = ("centres", "corners")


@dataclasses.dataclass(frozen=True)
class CornerGeometry(Geometry):
    """The same image under SD4Match's aligned corners; only for an image that was stretched to the input."""

    def _scale(self, grid: Size) -> NDArray[np.float64]:
        stretched = np.array(self.input, np.float64) / np.array(self.image, np.float64)
        return stretched * (np.array(grid, np.float64) - 1) / (np.array(self.input, np.float64) - 1)

    def to_cells(self, points: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Image pixels ``(N, 2)`` to cells; what lies beyond the outermost cells is moved onto them."""
        xy = np.reshape(np.asarray(points, np.float64), (-1, 2))
        return np.clip(xy * self._scale(grid), 0.0, np.array(grid, np.float64) - 1)

    def to_pixels(self, cells: ArrayLike, grid: Size) -> NDArray[np.float64]:
        """Cells ``(N, 2)`` to image pixels: the inverse of `to_cells` inside the map."""
        return np.reshape(np.asarray(cells, np.float64), (-1, 2)) / self._scale(grid)


@dataclasses.dataclass(frozen=True)
class Joining:
    """How an image's maps become one thing to match.

    Attributes:
        matcher: the recipe's.
        shares: one a map.
        upsample: how coarse maps are brought to the finest grid.
        combine: one of `COMBINES`.
        reading: one of `READINGS`.
    """

    matcher: Matcher
    shares: tuple[float, ...]
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
    def of(cls, recipe: Recipe, combining: str | None = None, reading: str = "centres") -> Joining:
        """What a recipe asks for; ``combining`` takes the place of its own.

        ``mutual`` compares all cells with all, for which sums of scores are made of the joined map.

        Raises:
            InputError: a name is unknown, or the matcher and the way of joining or reading exclude each other.
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

    def kept(self, maps: Sequence[FeatureMap]) -> tuple[FeatureMap, ...]:
        """What is kept of an image's maps: all, or the joined one."""
        if self.reading == "corners":
            geometry = maps[0].geometry
            corners = CornerGeometry(geometry.image, geometry.input, geometry.content)
            maps = [FeatureMap(one.data, corners) for one in maps]
        return tuple(maps) if self.apart else (combine(list(maps), self.shares, self.upsample),)

    def ready(self, kept: Sequence[FeatureMap]) -> Ready:
        """What was kept, made ready; costly steps are taken when first needed."""
        if self.apart:
            from difftap.matching.apart import ApartReady  # which is built on this module

            return ApartReady(kept, self)
        if self.reading == "corners" and self.matcher.name != "dense":
            return CornerReady(kept[0], self.matcher)
        return JoinedReady(kept[0], self.matcher)


class Ready:
    """An image made ready: source and target of any number of matches, all of one `Joining`."""

    @property
    def image_size(self) -> Size:
        """``(W, H)`` of the image in pixels."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory in bytes of what was made beside the maps, so far."""
        return 0

    def match(self, target: Ready, points: NDArray[np.float64], confidence: bool = True) -> Matches:
        """Match points ``(N, 2)`` of this image to the target's.

        Raises:
            InputError: as `match_points`.
        """
        raise NotImplementedError

    def mutual(self, target: Ready) -> Matches:
        """Matches that the two images find by themselves (`difftap.matching.mutual_matches`).

        Raises:
            InputError: the branches are multiplied, which leaves no vectors to compare.
        """
        raise NotImplementedError

    def heat(self, target: Ready, point: ArrayLike) -> NDArray[np.float32]:
        """Similarity ``(H, W)`` of one of this image's points with every pixel of the target, for a picture."""
        raise NotImplementedError


class JoinedReady(Ready):
    """One map, matched by `difftap.matching.match_points`."""

    def __init__(self, features: FeatureMap, matcher: Matcher) -> None:
        self._features = features
        self._matcher = matcher
        self._dense: DenseTarget | None = None

    @property
    def image_size(self) -> Size:
        """``(W, H)`` of the image in pixels."""
        return self._features.image_size

    @property
    def nbytes(self) -> int:
        """Memory of the norms, in bytes."""
        return 0 if self._dense is None else self._dense.inverse_norm.nbytes

    def _prepared(self) -> FeatureMap | DenseTarget:
        if self._matcher.name != "dense":
            return self._features
        if self._dense is None:
            self._dense = DenseTarget(self._features, self._matcher.interpolation)
        return self._dense

    def match(self, target: Ready, points: NDArray[np.float64], confidence: bool = True) -> Matches:
        """As `match_points`."""
        assert isinstance(target, JoinedReady)  # noqa: S101 - one Joining makes all of a run's
        # Without confidence the source's norms are not needed.
        source = self._prepared() if confidence else self._features
        return match_points(source, target._prepared(), points, self._matcher, confidence=confidence)

    def mutual(self, target: Ready) -> Matches:
        """As `mutual_matches`."""
        assert isinstance(target, JoinedReady)  # noqa: S101 - one Joining makes all of a run's
        return mutual_matches(self._features, target._features, self._matcher)

    def heat(self, target: Ready, point: ArrayLike) -> NDArray[np.float32]:
        """As `heat_map`."""
        assert isinstance(target, JoinedReady)  # noqa: S101 - one Joining makes all of a run's
        return heat_map(self._features, target._prepared(), point, self._matcher)


class CornerReady(JoinedReady):
    """One map, read by corners, for the matchers that work on cells: SD4Match's way."""

    def __init__(self, features: FeatureMap, matcher: Matcher) -> None:
        super().__init__(features, matcher)
        self._grid = GridTarget(features, matcher)

    def match(self, target: Ready, points: NDArray[np.float64], confidence: bool = True) -> Matches:
        """Match, and lead back for the cycle error; nothing is clipped into the image but the points read."""
        assert isinstance(target, CornerReady)  # noqa: S101 - one Joining makes all of a run's
        pixels, score, margin = target._find(self._features, points, confidence)
        error = np.full(len(points), np.nan)
        if confidence and len(points):
            error = cycle_error(points, self._find(target._features, pixels, False)[0])
        return Matches(points, pixels, score, margin, error)

    def _find(
        self, source: FeatureMap, points: NDArray[np.float64], margin: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        at = source.to_cells(points)
        corners = Corners.around(source, at) if self._matcher.name == "bilinear" else None
        cells, score, margins = self._grid.find_cells(unit(sample(source.data, at, "bilinear")), margin, corners)
        return self._features.to_pixels(cells), score, margins


def find(
    source: Ready, target: Ready, points: NDArray[np.float64], size: Size, confidence: bool = True
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
