"""A bootstrap over images: how sure means of distances are, when one image has a part in many of them.

Images are drawn with replacement. A distance between two images counts as often as the product of their numbers of
draws, one within an image as often as that image was drawn; a copy of an image is never held against another copy.
Axis letters: P distances; I images; R draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError

__all__ = ["DistanceSet", "Interval", "MeanBootstrap", "bootstrap_effect", "bootstrap_means"]


@dataclass(frozen=True)
class DistanceSet:
    """Distances, and the images that each one's two objects lie in.

    Attributes:
        values: ``(P,)``, finite.
        left: ``(P,)`` whole numbers, the first object's image, counted from 0.
        right: ``(P,)``, the second object's; may be the same.
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
    """A figure and its percentile interval; NaN where it has no value.

    Attributes:
        value: of the distances as given.
        low: lower end.
        high: upper end.
        draws: number of draws in which the figure had a value.
    """

    value: float
    low: float
    high: float
    draws: int


@dataclass(frozen=True)
class MeanBootstrap:
    """Means of sets of distances, with intervals over images.

    Attributes:
        means: by set.
        differences: mean of the second less mean of the first, by pair of sets, in the given order.
        trend: share of draws in which the means rise strictly in the given order; NaN if there was none with all means.
        images: number of images that were resampled.
        draws: number of draws, R.
        level: of the intervals.
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
    """Means of several sets over the same resampled images.

    Args:
        sets: by name; their order is that of the trend.
        draws: R.
        seed: of the drawing.
        level: of the intervals, 0 to 1.

    Raises:
        InputError: no set, or draws or level that are not allowed.
    """
    if not sets:
        raise InputError("no set of distances; allowed: one or more")
    _check(draws, level)
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
    """Kruskal-Wallis' epsilon squared of two sets, ranked anew in every draw, with its interval over images.

    Sorting is done once; a draw takes time in proportion to the number of distances.
    """
    _check(draws, level)
    images = max(first.images, second.images)
    values = np.concatenate([first.values, second.values])
    order = np.argsort(values, kind="stable")
    left = np.concatenate([first.left, second.left])[order]
    right = np.concatenate([first.right, second.right])[order]
    is_first = order < len(first)
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf) != 0)  # where a run of equal values begins
    drawn = np.empty(draws)
    for r, weights in enumerate(_weights(_present((first, second), images), draws, seed)):
        often = np.where(left == right, weights[left], weights[left] * weights[right])
        drawn[r] = _weighted_effect(often, is_first, starts)
    return _interval(_weighted_effect(np.ones(len(values)), is_first, starts), drawn, level)


def _weighted_effect(often: NDArray[np.float64], is_first: NDArray[np.bool_], starts: NDArray[np.int64]) -> float:
    """Epsilon squared of sorted values, each occurring ``often`` times."""
    if not len(often):
        return math.nan
    ties = np.add.reduceat(often, starts)
    ours = np.add.reduceat(often * is_first, starts)
    total, count = float(ties.sum()), float(ours.sum())
    if count == 0 or count == total:
        return math.nan
    ranks = np.cumsum(ties) - (ties - 1) / 2.0 - (total + 1) / 2.0  # midranks, their mean moved to 0
    variance = float(np.dot(ties, np.square(ranks)))
    part = float(np.dot(ours, ranks))
    return part**2 * (1 / count + 1 / (total - count)) / variance if variance > 0 else math.nan


def _check(draws: int, level: float) -> None:
    if draws < 1:
        raise InputError(f"draws is {draws}; allowed: 1 or more")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; allowed: a number between 0 and 1, such as 0.95")


def _present(sets: Collection[DistanceSet], images: int) -> NDArray[np.bool_]:
    """Which images have a part in some distance, ``(I,)``: the others are not drawn."""
    present = np.zeros(images, bool)
    for one in sets:
        present[one.left] = True
        present[one.right] = True
    return present


def _weights(present: NDArray[np.bool_], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each image is drawn, ``(I,)``, draw by draw."""
    rng, places = np.random.default_rng(seed), np.flatnonzero(present)
    for _ in range(draws):
        weights = np.zeros(len(present))
        if len(places):
            weights[places] = np.bincount(rng.integers(0, len(places), len(places)), minlength=len(places))
        yield weights


@dataclass(frozen=True)
class _ImageSums:
    """Sums and numbers of distances by pair of images, those that occur.

    A draw's mean needs no more, so its time does not grow with the number of distances. Unless few pairs of images
    occur they are kept as matrices too, and one product serves many draws.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    matrices: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @classmethod
    def of(cls, one: DistanceSet, images: int) -> _ImageSums:
        low, high = np.minimum(one.left, one.right), np.maximum(one.left, one.right)
        pairs, where = np.unique(low * max(images, 1) + high, return_inverse=True)
        sums = np.bincount(where, one.values, len(pairs)).astype(np.float64)
        counts = np.bincount(where, minlength=len(pairs)).astype(np.float64)
        left, right = pairs // max(images, 1), pairs % max(images, 1)
        dense = images <= _DENSE and 200 * len(pairs) > images**2
        matrices = (_table(left, right, sums, images), _table(left, right, counts, images)) if dense else None
        return cls(left, right, sums, counts, matrices)

    def means(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The means of several draws, ``(R,)``, from their weights ``(R, I)``."""
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
"""Most images whose pairs are kept as matrices: two of 128 MB a set."""

_BATCH = 128
"""Draws whose means are taken in one product."""


def _table(
    left: NDArray[np.int64], right: NDArray[np.int64], values: NDArray[np.float64], images: int
) -> NDArray[np.float64]:
    """Values by pair of images as a matrix ``(I, I)``, each pair once."""
    table = np.zeros((images, images))
    table[left, right] = values
    return table


def _products(table: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted sums of a table's entries, ``(R,)``.

    An entry between two images counts as often as the product of their weights, one within an image as its weight.
    """
    diagonal = np.diagonal(table)
    found: NDArray[np.float64] = np.einsum("ri,ri->r", weights @ table, weights) + (weights - weights**2) @ diagonal
    return found


def _batches(present: NDArray[np.bool_], draws: int, seed: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The weights of `_weights` in stacks ``(R, I)``, each with its first draw's number."""
    start, rows = 0, []
    for row in _weights(present, draws, seed):
        rows.append(row)
        if len(rows) == _BATCH:
            yield start, np.stack(rows)
            start, rows = start + len(rows), []
    if rows:
        yield start, np.stack(rows)


def _interval(value: float, drawn: NDArray[np.float64], level: float) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Interval(value, math.nan, math.nan, 0)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), len(known))
