"""From points on one image to points on another, by any matcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.errors import InputError, PointError
from difftap.featuremap import FeatureMap
from difftap.matching.confidence import cell_margins, cycle_error
from difftap.matching.dense import DenseTarget, Peaks
from difftap.matching.grid import Corners, GridTarget, clip_to_image, first_best
from difftap.matching.interpolate import sample, unit
from difftap.matching.mutual import mutual_nearest
from difftap.points import check_inside
from difftap.recipe import Matcher

__all__ = ["Matches", "check_points", "heat_map", "match_points", "mutual_matches"]

_BLOCK = 256  # points whose descriptors are held at once


@dataclass(frozen=True)
class Matches:
    """Points and where they were found.

    Attributes:
        source: ``(N, 2)`` pixels ``(x, y)`` of the source image.
        target: ``(N, 2)`` pixels of the target image; NaN where there is no match (only ``mutual`` refuses one).
        score: ``(N,)`` cosine of the two vectors, -1 to 1, higher is better; NaN where there is no match.
        margin: ``(N,)`` peak score less the best score farther than 2 cells of the target's map
            (`difftap.matching.confidence.RADIUS_CELLS`) from the peak: the lead over the second-best place. 0 to 2,
            higher is surer; NaN where not asked for, without a match, or where nothing lies that far away.
        cycle_error: ``(N,)`` distance in source pixels between the point and where its match leads back to under the
            same matcher; lower is surer; NaN where not asked for or without a match.
    """

    source: NDArray[np.float64]
    target: NDArray[np.float64]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    cycle_error: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.source)


def check_points(points: ArrayLike, features: FeatureMap) -> NDArray[np.float64]:
    """Points as float64 ``(N, 2)``, all on the image.

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
    return check_inside(array, features.image_size, "the source image")


def match_points(
    source: FeatureMap | DenseTarget,
    target: FeatureMap | DenseTarget,
    points: ArrayLike,
    matcher: Matcher,
    *,
    confidence: bool = True,
) -> Matches:
    """Find where points of the source image lie on the target image.

    ``dense`` returns whole pixels: the same ones as enlarging both maps to image size, normalising and taking the best
    cosine (`difftap.matching.dense`). The others choose or average cells and return fractional pixels. ``mutual`` moves
    the point to its nearest cell and matches it only if the cell found leads back there.

    Args:
        source: the source image's map; a `DenseTarget` of it saves its norms from being computed for the cycle error.
        target: the target image's map, or a `DenseTarget` of it shared among calls.
        points: ``(N, 2)`` source pixels ``(x, y)``, fractional allowed.
        matcher: the rule.
        confidence: also compute margin and cycle error, at about twice the cost.

    Raises:
        PointError: a point is not finite or not on the source image.
        InputError: the maps have different channel counts, hold NaN, or were prepared for another interpolation.
    """
    origin, other = _features(source), _features(target)
    _check_channels(origin, other)
    xy = check_points(points, origin)
    if not len(xy):
        return Matches(xy, np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros(0))
    ready = _prepare(target, matcher)
    # A mutual match needs the way back even if nobody asks how sure it is.
    home = _prepare(source, matcher) if confidence or matcher.name == "mutual" else None
    found = _locate(origin, ready, home, xy, matcher, confidence)
    error = np.full(len(xy), np.nan)
    matched = np.isfinite(found.pixels).all(axis=1)
    if confidence and home is not None and matched.any():
        back = _locate(other, home, ready, found.pixels[matched], matcher, False)
        error[matched] = cycle_error(xy[matched], back.pixels)
    return Matches(xy, found.pixels, found.score, found.margin, error)


def mutual_matches(source: FeatureMap, target: FeatureMap, matcher: Matcher) -> Matches:
    """Self-found matches: cells of the two maps that are each other's nearest neighbour, best score first.

    Points are the cells' centres, clipped into the images; cells that show only letterbox padding take no part.

    Args:
        source: the source image's map.
        target: the target image's map.
        matcher: finds the way back from each target point for the cycle error. With ``mutual`` or ``nn`` it repeats
            what is known already; ``dense`` judges the pair to the pixel.

    Raises:
        InputError: the maps have different channel counts or hold NaN.
    """
    _check_channels(source, target)
    ahead, home = GridTarget(source, Matcher("nn")), GridTarget(target, Matcher("nn"))
    ours, theirs = np.flatnonzero(ahead.cells), np.flatnonzero(home.cells)  # row-major cell indices
    indices, scores = mutual_nearest(_cell_vectors(source, ours), _cell_vectors(target, theirs))
    order = np.argsort(-scores[:, 0], kind="stable")
    order = order[indices[order, 0] >= 0]
    cells, peaks = ours[order], theirs[indices[order, 0]]
    margin = np.empty(len(order))
    for start in range(0, len(order), _BLOCK):
        part = slice(start, start + _BLOCK)
        margin[part] = cell_margins(home.similarity(_cell_vectors(source, cells[part])), peaks[part])
    points, found = _centres(source, cells), _centres(target, peaks)
    if matcher.name in ("mutual", "nn"):
        error = np.zeros(len(order))
    else:
        back = _locate(target, _prepare(source, matcher), None, found, matcher, False)
        error = cycle_error(points, back.pixels)
    return Matches(points, found, scores[order, 0], margin, error)


def heat_map(
    source: FeatureMap, target: FeatureMap | DenseTarget, point: ArrayLike, matcher: Matcher
) -> NDArray[np.float32]:
    """Cosine of one source point with every pixel of the target's image, ``(H, W)``, for a picture.

    Pixels are read with the matcher's interpolation, whichever matcher it is.

    Raises:
        PointError: the point is not finite or not on the source image.
        InputError: as `match_points`.
    """
    _check_channels(source, _features(target))
    one: Any = [point]  # a list of one point, whatever kind of pair it is
    xy = check_points(one, source)
    if len(xy) != 1:
        raise PointError("no point was given for the heat map; give one (x, y) in source pixels")
    descriptor = sample(source.data, source.to_cells(xy), matcher.interpolation)[0]
    return _prepare_dense(target, matcher).heat(descriptor).astype(np.float32)


def _features(given: FeatureMap | DenseTarget) -> FeatureMap:
    return given.features if isinstance(given, DenseTarget) else given


def _prepare(given: FeatureMap | DenseTarget, matcher: Matcher) -> DenseTarget | GridTarget:
    return _prepare_dense(given, matcher) if matcher.name == "dense" else GridTarget(_features(given), matcher)


def _prepare_dense(given: FeatureMap | DenseTarget, matcher: Matcher) -> DenseTarget:
    if not isinstance(given, DenseTarget):
        return DenseTarget(given, matcher.interpolation)
    if given.interpolation != matcher.interpolation:
        raise InputError(
            f"the target was prepared for {given.interpolation} interpolation and the matcher asks for "
            f"{matcher.interpolation}; prepare it with the matcher's"
        )
    return given


def _check_channels(source: FeatureMap, target: FeatureMap) -> None:
    if source.channels != target.channels:
        raise InputError(
            f"the source map has {source.channels} channels and the target map {target.channels}; "
            "match maps of the same taps and model"
        )


def _locate(
    source: FeatureMap,
    target: DenseTarget | GridTarget,
    home: DenseTarget | GridTarget | None,
    points: NDArray[np.float64],
    matcher: Matcher,
    margin: bool,
) -> Peaks:
    """Where points ``(N, 2)`` of the source match; ``home``, the source made ready, is needed by ``mutual`` alone."""
    parts = []
    for start in range(0, len(points), _BLOCK):
        cells = source.to_cells(points[start : start + _BLOCK])
        if isinstance(target, GridTarget) and isinstance(home, GridTarget) and matcher.name == "mutual":
            parts.append(_locate_mutual(home, target, cells, margin))
        else:
            interpolation = matcher.interpolation if matcher.name == "dense" else "bilinear"
            descriptors = sample(source.data, cells, interpolation)
            if isinstance(target, GridTarget) and matcher.name == "bilinear":
                parts.append(target.find(descriptors, margin, Corners.around(source, cells)))
            else:
                parts.append(target.find(descriptors, margin))
    return Peaks(
        np.concatenate([p.pixels for p in parts] or [np.zeros((0, 2))]),
        np.concatenate([p.score for p in parts] or [np.zeros(0)]),
        np.concatenate([p.margin for p in parts] or [np.zeros(0)]),
    )


def _locate_mutual(source: GridTarget, target: GridTarget, cells: NDArray[np.float64], margin: bool) -> Peaks:
    """Matches of the cells nearest to fractional cells ``(N, 2)``, NaN where the way back leads elsewhere."""
    rows, columns = np.flatnonzero(source.cells.any(axis=1)), np.flatnonzero(source.cells.any(axis=0))
    x = np.clip(np.floor(cells[:, 0] + 0.5).astype(np.int64), columns[0], columns[-1])
    y = np.clip(np.floor(cells[:, 1] + 0.5).astype(np.int64), rows[0], rows[-1])
    own = y * source.features.grid[0] + x
    similarity = target.similarity(_cell_vectors(source.features, own))  # (N, h, w)
    peaks = first_best(similarity)
    back = first_best(source.similarity(_cell_vectors(target.features, peaks)))
    agreed = back == own
    score = similarity.reshape(len(own), -1)[np.arange(len(own)), peaks]
    margins = cell_margins(similarity, peaks) if margin else np.full(len(own), np.nan)
    return Peaks(
        np.where(agreed[:, None], _centres(target.features, peaks), np.nan),
        np.where(agreed, score, np.nan),
        np.where(agreed, margins, np.nan),
    )


def _cell_vectors(features: FeatureMap, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Unit vectors ``(N, C)`` of cells given by row-major index."""
    return unit(features.data.reshape(features.channels, -1)[:, cells].T)


def _centres(features: FeatureMap, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centres ``(N, 2)`` in pixels of cells given by row-major index, clipped into the image."""
    y, x = np.divmod(cells, features.grid[0])
    return clip_to_image(features.to_pixels(np.stack([x, y], axis=1)), features.image_size)
