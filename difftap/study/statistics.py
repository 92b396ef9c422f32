"""What is said of sets of distances: box-plot figures, Dunn indices, tests of normality and of equal location.

Pure functions on arrays; results carry their counts and conventions. Distances that share an object or an image are
not independent, so a test's p-value is a lower bound at best: `difftap.study.bootstrap` resamples images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.errors import InputError, require

__all__ = [
    "BoxFigures",
    "Dunn",
    "KruskalWallis",
    "ShapiroWilk",
    "box_figures",
    "dunn_mean",
    "dunn_minmax",
    "kruskal_wallis",
    "shapiro_wilk",
    "trend_holds",
]

SHAPIRO_LIMIT = 5000
"""Most values that Royston's approximation of Shapiro-Wilk's p-value is made for."""


def _values(values: ArrayLike, what: str = "distances") -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"{what} have the shape {array.shape}; allowed: one axis of finite numbers")
    return array


@dataclass(frozen=True)
class BoxFigures:
    """What a box plot shows, and the two moments; NaN where there are too few values.

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
    """The figures of one box.

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
    # A quartile may lie between two values, all beyond it being outliers: the whisker then ends at the box.
    low, high = min(q1, float(inside.min(initial=q1))), max(q3, float(inside.max(initial=q3)))
    std = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    count = len(array)
    return BoxFigures(count, float(array.mean()), std, minimum, q1, median, q3, maximum, low, high, count - len(inside))


@dataclass(frozen=True)
class Dunn:
    """How far apart two sets of distances are, in units of their own spread; larger is better.

    Attributes:
        value: ``apart / spread``; infinite for two different points without spread; NaN for an empty set or twice the
            same point.
        apart: distance between the sets.
        spread: of the set that is spread more.
        counts: number of values in each set.
        convention: what `apart` and `spread` stand for.
    """

    value: float
    apart: float
    spread: float
    counts: tuple[int, int]
    convention: str


def dunn_minmax(first: ArrayLike, second: ArrayLike) -> Dunn:
    """Dunn's index of two sets on a line (1974): least distance between the sets over the larger diameter.

    Sets that overlap come near 0 whatever their means.

    >>> dunn_minmax([0, 1], [3, 5]).value
    1.0
    """
    a, b = np.sort(_values(first)), np.sort(_values(second))
    if not len(a) or not len(b):
        return Dunn(math.nan, math.nan, math.nan, (len(a), len(b)), _MINMAX)
    place = np.searchsorted(b, a)
    above, below = b[np.minimum(place, len(b) - 1)], b[np.maximum(place - 1, 0)]
    apart = float(np.minimum(np.abs(above - a), np.abs(a - below)).min())
    spread = float(max(np.ptp(a), np.ptp(b)))
    return Dunn(_ratio(apart, spread), apart, spread, (len(a), len(b)), _MINMAX)


def dunn_mean(first: ArrayLike, second: ArrayLike) -> Dunn:
    """Dunn's index with means for extremes (Bezdek and Pal 1998): distance of the means over the larger mean distance.

    Between the sets, the distance of their means; within a set, the mean over pairs of different members. It is what
    a published index well above 0 on overlapping sets suggests [I].

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
    """Mean of ``|x_i - x_j|`` over all pairs of different members; 0 for a single one."""
    count = len(values)
    if count < 2:
        return 0.0
    ordered = np.sort(values) - values.mean()
    # The k-th smallest is added k - 1 times and taken away n - k times.
    return float(2.0 * np.dot(2.0 * np.arange(1, count + 1) - count - 1, ordered) / (count * (count - 1)))


@dataclass(frozen=True)
class ShapiroWilk:
    """Shapiro-Wilk's test that values are normal.

    Attributes:
        statistic: W; NaN where there is none (fewer than three values, or all equal).
        p: chance of such a W among normal values; NaN where there is none.
        count: number of values given.
        tested: number of values tested: at most `SHAPIRO_LIMIT`, drawn without replacement.
    """

    statistic: float
    p: float
    count: int
    tested: int


def shapiro_wilk(values: ArrayLike, *, limit: int = SHAPIRO_LIMIT, seed: int = 0) -> ShapiroWilk:
    """Test values for normality; of more than ``limit``, a seeded sample is tested.

    Raises:
        InputError: the limit is not 3 to `SHAPIRO_LIMIT`.
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
    """Kruskal-Wallis' test that several sets have one location.

    Attributes:
        statistic: H, corrected for ties; NaN where there is none (fewer than two sets with values, or all values
            equal).
        p: chance of such an H under equal locations, by the chi-squared approximation; NaN where there is none.
        epsilon_squared: effect size, ``H / (n - 1)``: 0 none, 1 the sets' ranks do not mix (Tomczak and Tomczak 2014).
        counts: number of values in each set.
    """

    statistic: float
    p: float
    epsilon_squared: float
    counts: tuple[int, ...]


def kruskal_wallis(*sets: ArrayLike) -> KruskalWallis:
    """Test two or more sets of values.

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
    if np.ptp(together) == 0:
        return nothing
    _, where, ties = np.unique(together, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2.0)[where] - (total + 1) / 2.0  # midranks, their mean moved to 0
    ends = np.cumsum([len(one) for one in filled])[:-1]
    between = math.fsum(float(part.sum()) ** 2 / len(part) for part in np.split(ranks, ends))
    # H is the share of the ranks' variance that lies between the sets, times n - 1; ties are in the variance.
    share = between / float(np.square(ranks).sum())
    statistic = (total - 1) * share
    p = float(require("scipy.stats", "bench", "Kruskal-Wallis' test").chi2.sf(statistic, len(filled) - 1))
    return KruskalWallis(statistic, p, share, counts)


def trend_holds(means: Mapping[str, float], order: Sequence[str] = ("scsi", "scdi", "dcsi", "dcdi")) -> bool | None:
    """Whether the means rise strictly in the given order (the paper's Eq. 16); None if one is missing or NaN.

    For transforms (Eq. 17) the order is ``sidi, scsi, dcsi``.

    >>> trend_holds({"sidi": 0.1, "scsi": 0.2, "dcsi": 0.2}, ("sidi", "scsi", "dcsi"))
    False
    """
    values = [means.get(name, math.nan) for name in order]
    if any(math.isnan(value) for value in values):
        return None
    return all(a < b for a, b in itertools.pairwise(values))
