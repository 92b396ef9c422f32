"""Statistics of sets of distances: box-plot figures, Dunn indices, tests, and intervals from resampled images.

The functions are pure; results carry their counts and conventions. Distances that share an object or an image are not
independent, so a test's p-value is a lower bound at best. Therefore the bootstrap draws images, with replacement. If
images i and j were drawn m and n times, a distance between them counts m n times, and a distance within image i counts
m times: two copies of the same image are never compared.
Axis letters: P distances; I images; R draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.bench.bootstrap import check_draws, draw_counts, percentile_interval
from difftap.errors import InputError, require

__all__ = [
    "BoxFigures",
    "DistanceSet",
    "Dunn",
    "Interval",
    "KruskalWallis",
    "MeanBootstrap",
    "ShapiroWilk",
    "bootstrap_effect",
    "bootstrap_means",
    "box_figures",
    "dunn_mean",
    "dunn_minmax",
    "kruskal_wallis",
    "shapiro_wilk",
    "trend_holds",
]

SHAPIRO_LIMIT = 5000
"""Royston's approximation of Shapiro-Wilk's p-value is made for at most this many values."""


def _values(values: ArrayLike, what: str = "distances") -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"{what} have the shape {array.shape}; allowed: one axis of finite numbers")
    return array


@dataclass(frozen=True)
class BoxFigures:
    """The figures of a box plot, with mean and standard deviation; NaN if there are too few values.

    Attributes:
        count: number of values, n.
        mean: arithmetic mean.
        std: standard deviation of the sample, with n - 1.
        minimum: smallest value.
        q1: lower quartile, linear between order statistics (Hyndman and Fan's type 7, numpy's and matplotlib's own).
        median: middle value.
        q3: upper quartile.
        maximum: largest value.
        low: lower whisker: smallest value within 1.5 interquartile ranges of q1 (Tukey).
        high: upper whisker.
        outliers: number of values beyond the whiskers.
    """

    count: int
    mean: float
    std: float
    minimum: float
    q1: float
    median: float
    q3: float
    maximum: float
    low: float
    high: float
    outliers: int


def box_figures(values: ArrayLike) -> BoxFigures:
    """Compute the figures of one box.

    >>> box = box_figures([1, 2, 3, 4, 100])
    >>> box.median, box.q3, box.high, box.outliers
    (3.0, 4.0, 4.0, 1)
    """
    array = _values(values)
    if not len(array):
        nan = math.nan
        return BoxFigures(0, nan, nan, nan, nan, nan, nan, nan, nan, nan, 0)
    minimum, q1, median, q3, maximum = (float(q) for q in np.percentile(array, [0, 25, 50, 75, 100]))
    reach = 1.5 * (q3 - q1)
    inside = array[(array >= q1 - reach) & (array <= q3 + reach)]
    # A quartile may lie between two values, and all values beyond it may be outliers. The whisker then ends at the box.
    low, high = min(q1, float(inside.min(initial=q1))), max(q3, float(inside.max(initial=q3)))
    std = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    count = len(array)
    return BoxFigures(count, float(array.mean()), std, minimum, q1, median, q3, maximum, low, high, count - len(inside))


@dataclass(frozen=True)
class Dunn:
    """The separation of two sets of distances relative to their spread; larger is better.

    Attributes:
        value: ``apart / spread``. Infinite for two different points without spread; NaN if a set is empty, or both are
            the same point.
        apart: distance between the sets.
        spread: spread of the set that has the larger one.
        counts: number of values in each set.
        convention: how ``apart`` and ``spread`` are measured.
    """

    value: float
    apart: float
    spread: float
    counts: tuple[int, int]
    convention: str


def dunn_minmax(first: ArrayLike, second: ArrayLike) -> Dunn:
    """Compute Dunn's index (1974) of two sets: the least distance between them, divided by the larger diameter.

    It is near 0 for all sets that overlap, whatever their means.

    >>> dunn_minmax([0, 1], [3, 5]).value
    1.0
    """
    a, b = np.sort(_values(first)), np.sort(_values(second))
    if not len(a) or not len(b):
        return Dunn(math.nan, math.nan, math.nan, (len(a), len(b)), _MINMAX)
    place = np.searchsorted(b, a)  # the nearest members of b are its sorted neighbours: no table of all distances
    above, below = b[np.minimum(place, len(b) - 1)], b[np.maximum(place - 1, 0)]
    apart = float(np.minimum(np.abs(above - a), np.abs(a - below)).min())
    spread = float(max(np.ptp(a), np.ptp(b)))
    return Dunn(_ratio(apart, spread), apart, spread, (len(a), len(b)), _MINMAX)


def dunn_mean(first: ArrayLike, second: ArrayLike) -> Dunn:
    """Compute Dunn's index with means instead of extremes (Bezdek and Pal 1998).

    It is the distance between the two means, divided by the larger mean distance between two members of a set. The
    paper's values are well above 0 for sets that overlap, so this is probably its form.

    >>> dunn_mean([0, 2], [5, 5]).value
    2.0
    """
    a, b = _values(first), _values(second)
    if not len(a) or not len(b):
        return Dunn(math.nan, math.nan, math.nan, (len(a), len(b)), _MEAN)
    apart = float(abs(a.mean() - b.mean()))
    spread = max(_mean_difference(a), _mean_difference(b))
    return Dunn(_ratio(apart, spread), apart, spread, (len(a), len(b)), _MEAN)


_MINMAX = "least distance between members of the two sets / largest distance within a set"
_MEAN = "distance of the two means / larger of the mean distances between two members of a set"


def _ratio(apart: float, spread: float) -> float:
    if spread > 0:
        return apart / spread
    return math.inf if apart > 0 else math.nan


def _mean_difference(values: NDArray[np.float64]) -> float:
    """Compute the mean of ``|x_i - x_j|`` over all pairs of different members; 0 for a single one."""
    count = len(values)
    if count < 2:
        return 0.0
    ordered = np.sort(values) - values.mean()
    # In sorted order, the k-th value is added k - 1 times and subtracted n - k times: O(n log n) instead of O(n^2).
    return float(2.0 * np.dot(2.0 * np.arange(1, count + 1) - count - 1, ordered) / (count * (count - 1)))


@dataclass(frozen=True)
class ShapiroWilk:
    """The result of Shapiro-Wilk's test that values are normally distributed.

    Attributes:
        statistic: W; NaN for fewer than three values, or equal values.
        p: probability of such a W for normal values; NaN if there is no W.
        count: number of values given.
        tested: number of values tested, at most `SHAPIRO_LIMIT`; drawn without replacement.
    """

    statistic: float
    p: float
    count: int
    tested: int


def shapiro_wilk(values: ArrayLike, *, limit: int = SHAPIRO_LIMIT, seed: int = 0) -> ShapiroWilk:
    """Test values for normality; if there are more than ``limit``, test a random sample of them.

    Raises:
        InputError: the limit is below 3 or above `SHAPIRO_LIMIT`.
        MissingExtraError: scipy is not installed.
    """
    if not 3 <= limit <= SHAPIRO_LIMIT:
        raise InputError(f"limit is {limit}; allowed: 3 to {SHAPIRO_LIMIT}, for which the test's p-value is made")
    array = _values(values)
    part = array
    if len(array) > limit:
        part = array[np.sort(np.random.default_rng(seed).choice(len(array), limit, replace=False))]
    if len(part) < 3 or np.ptp(part) == 0:
        return ShapiroWilk(math.nan, math.nan, len(array), len(part))
    found = require("scipy.stats", "bench", "Shapiro-Wilk's test").shapiro(part)
    return ShapiroWilk(float(found.statistic), float(found.pvalue), len(array), len(part))


@dataclass(frozen=True)
class KruskalWallis:
    """The result of Kruskal-Wallis' test that several sets have the same location.

    Attributes:
        statistic: H, corrected for ties; NaN if fewer than two sets have values, or all values are equal.
        p: probability of such an H for equal locations, by the chi-squared approximation; NaN if there is no H.
        epsilon_squared: effect size ``H / (n - 1)`` (Tomczak and Tomczak 2014): 0 for no effect, 1 if the sets' ranks
            do not mix.
        counts: number of values in each set.
    """

    statistic: float
    p: float
    epsilon_squared: float
    counts: tuple[int, ...]


def kruskal_wallis(*sets: ArrayLike) -> KruskalWallis:
    """Test whether two or more sets of values have the same location.

    Raises:
        InputError: fewer than two sets were given.
        MissingExtraError: scipy is not installed.
    """
    if len(sets) < 2:
        raise InputError(f"{len(sets)} sets of distances; allowed: two or more")
    arrays = [_values(one) for one in sets]
    counts = tuple(len(one) for one in arrays)
    filled = [one for one in arrays if len(one)]
    total = sum(counts)
    nothing = KruskalWallis(math.nan, math.nan, math.nan, counts)
    if len(filled) < 2:
        return nothing
    together = np.concatenate(filled)
    if np.ptp(together) == 0:  # all ranks are tied, and the correction for ties would divide by zero
        return nothing
    found = require("scipy.stats", "bench", "Kruskal-Wallis' test").kruskal(*filled)
    statistic = float(found.statistic)
    return KruskalWallis(statistic, float(found.pvalue), statistic / (total - 1), counts)


def trend_holds(means: Mapping[str, float], order: Sequence[str] = ("scsi", "scdi", "dcsi", "dcdi")) -> bool | None:
    """Tell whether the means rise strictly in the given order (the paper's Eq. 16); None if one is missing or NaN.

    The order for transforms (Eq. 17) is ``sidi, scsi, dcsi``.

    >>> trend_holds({"sidi": 0.1, "scsi": 0.2, "dcsi": 0.2}, ("sidi", "scsi", "dcsi"))
    False
    """
    values = [means.get(name, math.nan) for name in order]
    if any(math.isnan(value) for value in values):
        return None
    return all(a < b for a, b in itertools.pairwise(values))


@dataclass(frozen=True)
class DistanceSet:
    """Distances between pairs of objects, with the images of both objects.

    Attributes:
        values: ``(P,)``, finite.
        left: ``(P,)``, number of the first object's image, from 0.
        right: ``(P,)``, number of the second object's image; it may be the same.

    Raises:
        InputError: the arrays differ in length, a distance is not finite, or a number is below 0.
    """

    values: NDArray[np.float64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, np.float64))
        for name in ("left", "right"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))
        shapes = {one.shape for one in (self.values, self.left, self.right)}
        if len(shapes) != 1 or self.values.ndim != 1 or not np.isfinite(self.values).all():
            raise InputError(f"distances and their images have the shapes {shapes}; allowed: one, (P,), finite values")
        if len(self.values) and min(self.left.min(), self.right.min()) < 0:
            raise InputError("an image's number is below 0; allowed: whole numbers from 0")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def images(self) -> int:
        """One more than the largest image number; 0 without distances."""
        return int(max(self.left.max(), self.right.max())) + 1 if len(self) else 0


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval; NaN if there is none.

    Attributes:
        value: the figure of the given distances.
        low: lower end of the interval.
        high: upper end.
        draws: number of draws in which the figure had a value.
    """

    value: float
    low: float
    high: float
    draws: int


@dataclass(frozen=True)
class MeanBootstrap:
    """Means of sets of distances, with intervals from resampled images.

    Attributes:
        means: the mean of each set.
        differences: for each pair of sets, in the given order, the second's mean minus the first's.
        trend: share of draws in which the means rise strictly in the given order; NaN if no draw had all means.
        images: number of images that were resampled.
        draws: number of draws, R.
        level: level of the intervals, 0 to 1.
    """

    means: Mapping[str, Interval]
    differences: Mapping[tuple[str, str], Interval]
    trend: float
    images: int
    draws: int
    level: float


def bootstrap_means(
    sets: Mapping[str, DistanceSet], *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> MeanBootstrap:
    """Compute the means of several sets and their intervals. All sets share the resampled images of a draw.

    Args:
        sets: the sets by name; their order is that of the trend.
        draws: number of draws, R.
        seed: seed of the draws.
        level: level of the intervals, 0 to 1.

    Raises:
        InputError: there is no set, or ``draws`` or ``level`` is not allowed.
    """
    if not sets:
        raise InputError("no set of distances; allowed: one or more")
    check_draws(draws, level)
    images = max(one.images for one in sets.values())
    present = _present(sets.values(), images)
    sums = {name: _ImageSums.of(one, images) for name, one in sets.items()}
    drawn = {name: np.empty(draws) for name in sets}
    for start, weights in _batches(present, draws, seed):
        for name, one in sums.items():
            drawn[name][start : start + len(weights)] = one.means(weights)
    given = {name: float(one.values.mean()) if len(one) else math.nan for name, one in sets.items()}
    names = list(sets)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    table = np.stack([drawn[name] for name in names])  # (sets, R)
    known = table[:, np.isfinite(table).all(axis=0)]
    return MeanBootstrap(
        {name: _interval(given[name], drawn[name], level) for name in names},
        {(a, b): _interval(given[b] - given[a], drawn[b] - drawn[a], level) for a, b in pairs},
        float((np.diff(known, axis=0) > 0).all(axis=0).mean()) if known.size else math.nan,
        int(present.sum()),
        draws,
        level,
    )


def bootstrap_effect(
    first: DistanceSet, second: DistanceSet, *, draws: int = 200, seed: int = 0, level: float = 0.95
) -> Interval:
    """Compute Kruskal-Wallis' epsilon squared of two sets, and its interval from resampled images.

    Every draw ranks the distances again. They are sorted only once, so a draw takes time in proportion to their number.

    Args:
        first: one set.
        second: the other set.
        draws: number of draws.
        seed: seed of the draws.
        level: level of the interval, 0 to 1.
    """
    check_draws(draws, level)
    images = max(first.images, second.images)
    values = np.concatenate([first.values, second.values])
    order = np.argsort(values, kind="stable")
    left = np.concatenate([first.left, second.left])[order]
    right = np.concatenate([first.right, second.right])[order]
    is_first = order < len(first)
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf) != 0)  # first index of each run of equal values
    drawn = np.empty(draws)
    for r, weights in enumerate(_weights(_present((first, second), images), draws, seed)):
        often = np.where(left == right, weights[left], weights[left] * weights[right])
        drawn[r] = _weighted_effect(often, is_first, starts)
    return _interval(_weighted_effect(np.ones(len(values)), is_first, starts), drawn, level)


def _weighted_effect(often: NDArray[np.float64], is_first: NDArray[np.bool_], starts: NDArray[np.int64]) -> float:
    """Compute epsilon squared of sorted values, each of which occurs ``often`` times."""
    if not len(often):
        return math.nan
    ties = np.add.reduceat(often, starts)
    ours = np.add.reduceat(often * is_first, starts)
    total, count = float(ties.sum()), float(ours.sum())
    if count == 0 or count == total:
        return math.nan
    ranks = np.cumsum(ties) - (ties - 1) / 2.0 - (total + 1) / 2.0  # mid-ranks of ties, minus their mean
    variance = float(np.dot(ties, np.square(ranks)))
    part = float(np.dot(ours, ranks))
    return part**2 * (1 / count + 1 / (total - count)) / variance if variance > 0 else math.nan


def _present(sets: Collection[DistanceSet], images: int) -> NDArray[np.bool_]:
    """Mark the images that occur in some distance, ``(I,)``; the others are not drawn."""
    present = np.zeros(images, bool)
    for one in sets:
        present[one.left] = True
        present[one.right] = True
    return present


def _weights(present: NDArray[np.bool_], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield, for each draw, how often each image is drawn, ``(I,)``."""
    rng, places = np.random.default_rng(seed), np.flatnonzero(present)
    for _ in range(draws):
        weights = np.zeros(len(present))
        weights[places] = draw_counts(rng, len(places))
        yield weights


@dataclass(frozen=True)
class _ImageSums:
    """Sum and number of the distances of each pair of images that occurs.

    The mean of a draw needs nothing else, so its time does not grow with the number of distances. Unless few pairs of
    images occur, they are also kept as matrices, so that one matrix product serves many draws.

    Attributes:
        left: number of each pair's first image, the smaller one.
        right: number of its second image.
        sums: sum of its distances.
        counts: number of its distances.
        matrices: sums and counts as ``(I, I)``; None if they would be mostly empty or too large.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    matrices: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @classmethod
    def of(cls, one: DistanceSet, images: int) -> _ImageSums:
        low, high = np.minimum(one.left, one.right), np.maximum(one.left, one.right)
        # One number for each pair of images, in either order.
        pairs, where = np.unique(low * max(images, 1) + high, return_inverse=True)
        sums = np.bincount(where, one.values, len(pairs)).astype(np.float64)
        counts = np.bincount(where, minlength=len(pairs)).astype(np.float64)
        left, right = pairs // max(images, 1), pairs % max(images, 1)
        dense = images <= _DENSE and 200 * len(pairs) > images**2  # at least one entry in 200 would be filled
        matrices = (_table(left, right, sums, images), _table(left, right, counts, images)) if dense else None
        return cls(left, right, sums, counts, matrices)

    def means(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the means of several draws, ``(R,)``, from their weights ``(R, I)``."""
        if self.matrices is not None:
            total, many = (_products(table, weights) for table in self.matrices)
        else:
            total, many = np.array([self._looked_up(row) for row in weights]).T
        found: NDArray[np.float64] = np.divide(total, many, out=np.full(len(weights), math.nan), where=many > 0)
        return found

    def _looked_up(self, weights: NDArray[np.float64]) -> tuple[float, float]:
        often = np.where(self.left == self.right, weights[self.left], weights[self.left] * weights[self.right])
        return float(np.dot(often, self.sums)), float(np.dot(often, self.counts))


_DENSE = 4000
"""The pairs of at most this many images are kept as matrices: two of 128 MB per set."""

_BATCH = 128
"""Number of draws whose means are computed in one product."""


def _table(
    left: NDArray[np.int64], right: NDArray[np.int64], values: NDArray[np.float64], images: int
) -> NDArray[np.float64]:
    """Put the values of pairs of images into a matrix ``(I, I)``, each pair once."""
    table = np.zeros((images, images))
    table[left, right] = values
    return table


def _products(table: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the weighted sum of a table's entries for each draw, ``(R,)``.

    An entry between two images has the product of their weights; an entry within an image has the image's weight. The
    product w A w gives diagonal entries the squared weight, which the second term corrects.
    """
    diagonal = np.diagonal(table)
    found: NDArray[np.float64] = np.einsum("ri,ri->r", weights @ table, weights) + (weights - weights**2) @ diagonal
    return found


def _batches(present: NDArray[np.bool_], draws: int, seed: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Stack the weights of `_weights` to batches ``(R, I)``; yield each with the number of its first draw."""
    start, rows = 0, []
    for row in _weights(present, draws, seed):
        rows.append(row)
        if len(rows) == _BATCH:
            yield start, np.stack(rows)
            start, rows = start + len(rows), []
    if rows:
        yield start, np.stack(rows)


def _interval(value: float, drawn: NDArray[np.float64], level: float) -> Interval:
    (low,), (high,) = percentile_interval(drawn[:, None], level)
    return Interval(value, float(low), float(high), int(np.isfinite(drawn).sum()))
