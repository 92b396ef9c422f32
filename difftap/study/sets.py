"""The study's sets of distances: pairs of objects that share a class, an image or an identity, and their analysis.

Axis letters: N objects; P pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.table import plain
from difftap.prototypes import PrototypeTable
from difftap.retrieval.distances import blocks, pairwise
from difftap.study.statistics import (
    DistanceSet,
    Interval,
    bootstrap_effect,
    bootstrap_means,
    box_figures,
    dunn_mean,
    dunn_minmax,
    kruskal_wallis,
    shapiro_wilk,
    trend_holds,
)

__all__ = ["EQ16", "EQ17", "MOST_PAIRS", "SETS", "PairSet", "aligned_distances", "analyse", "codes", "pair_sets"]

SETS = ("scsi", "scdi", "dcsi", "dcdi", "sidi")
"""scsi: same class, same image; scdi: same class, different image; dcsi: different class, same image; dcdi: different
class, different image; sidi: same instance, different image, whose pairs are in no other set."""

MOST_PAIRS = 2_000_000
"""At most about this many distances of a set are kept; of more, a random sample. Means and deviations use all pairs."""

_ROWS = 64  # rows compared at once; `pairwise` computes a square, of which the diagonal is used


@dataclass(frozen=True)
class PairSet:
    """One set of distances.

    Attributes:
        kept: the distances, with the two images of each; a random sample if there are more than `MOST_PAIRS`.
        count: number of all pairs.
        mean: mean of all pairs; NaN if there are none.
        std: standard deviation of all pairs, with n - 1; NaN below two pairs.
    """

    kept: DistanceSet
    count: int
    mean: float
    std: float


def codes(table: PrototypeTable) -> NDArray[np.int64]:
    """Give the class, image and instance of each row as numbers, ``(3, N)``."""
    columns = (table.classes, table.images, table.instances)
    return np.stack([np.unique(column, return_inverse=True)[1].ravel() for column in columns]).astype(np.int64)


def _which(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int8]:
    """Find the set of each pair, ``(n, m)``, by its place in `SETS`; -1 for one instance seen twice in an image."""
    same = left[:, :, None] == right[:, None, :]  # (3, n, m)
    which = np.where(same[0], np.where(same[1], 0, 1), np.where(same[1], 2, 3)).astype(np.int8)
    which[same[2]] = np.where(same[1], -1, 4)[same[2]]
    return which


def _counts(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the pairs of each set."""
    counts = np.zeros(len(SETS), np.int64)
    count = numbers.shape[1]
    for start in range(0, count, 1024):
        rows = slice(start, min(start + 1024, count))
        which = _which(numbers[:, rows], numbers[:, rows.start :])
        # Without the lower triangle and the diagonal: each pair once, and no object with itself.
        which[np.tril_indices(which.shape[0], 0, which.shape[1])] = -1
        counts += np.bincount(which[which >= 0], minlength=len(SETS))
    return counts


def _upper(
    table: PrototypeTable, numbers: NDArray[np.int64], metric: str, device: str
) -> Iterator[tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield every pair once, in pieces: its set, its distance, and its two rows."""
    for rows, columns, block in blocks(table.vectors, metric=metric, device=device):
        if columns.start < rows.start:
            continue  # the transpose of a tile that came before
        which = _which(numbers[:, rows], numbers[:, columns])
        if columns.start == rows.start:
            which[np.tril_indices(which.shape[0], 0, which.shape[1])] = -1
        i, j = np.nonzero(which >= 0)
        yield which[i, j], block[i, j], i + rows.start, j + columns.start


def pair_sets(
    table: PrototypeTable, metric: str, *, device: str = "cpu", most: int = MOST_PAIRS, seed: int = 0
) -> Mapping[str, PairSet]:
    """Compute the distances of all pairs of objects, set by set.

    Args:
        table: the prototypes.
        metric: one of `difftap.retrieval.distances.METRICS`.
        device: ``cpu`` or ``cuda``.
        most: number of distances of a set to keep.
        seed: seed of the sample, if a set has more.

    Returns:
        set's name -> its distances.
    """
    numbers = codes(table)
    counts = _counts(numbers)  # before the distances: the share to keep must be known when the first ones come
    share = np.minimum(1.0, most / np.maximum(counts, 1))
    rng = np.random.default_rng(seed)
    sums = np.zeros((2, len(SETS)))
    pieces: list[list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]] = [[] for _ in SETS]
    shift: float | None = None
    for which, values, i, j in _upper(table, numbers, metric, device):
        if shift is None and len(values):
            shift = float(values[0])  # a value near the mean: sums of squares around it lose few digits
        moved = values.astype(np.float64) - (shift or 0.0)
        sums += np.stack([np.bincount(which, moved**power, len(SETS)) for power in (1, 2)])
        # Each pair of a set is kept with the same probability, so one pass over the distances is enough.
        drawn = rng.random(len(which)) < share[which] if (share < 1).any() else np.ones(len(which), np.bool_)
        for k in range(len(SETS)):
            mine = drawn & (which == k)
            if mine.any():
                pieces[k].append((values[mine], numbers[1, i[mine]], numbers[1, j[mine]]))
    return {name: _pair_set(pieces[k], int(counts[k]), sums[:, k], shift or 0.0) for k, name in enumerate(SETS)}


def _pair_set(
    pieces: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
    count: int,
    sums: NDArray[np.float64],
    shift: float,
) -> PairSet:
    values, left, right = (
        (np.concatenate([piece[k] for piece in pieces]) if pieces else np.zeros(0, np.int64)) for k in range(3)
    )
    mean = float(sums[0]) / count if count else float("nan")
    spread = float(sums[1]) - count * mean**2 if count else 0.0
    std = max(spread / (count - 1), 0.0) ** 0.5 if count > 1 else float("nan")  # rounding may make it negative
    return PairSet(DistanceSet(values.astype(np.float64), left, right), count, mean + shift, std)


def aligned_distances(
    x: NDArray[np.float32], y: NDArray[np.float32], metric: str, device: str = "cpu"
) -> NDArray[np.float32]:
    """Compute the distance of each row of ``x`` to the same row of ``y``, ``(N,)``."""
    parts = [
        np.diagonal(pairwise(x[k : k + _ROWS], y[k : k + _ROWS], metric=metric, device=device))
        for k in range(0, len(x), _ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


_EFFECT_PAIRS = 20_000
"""At most this many distances of a set are used for the effect size's interval, because every draw ranks them again."""

EQ16 = ("scsi", "scdi", "dcsi", "dcdi")
"""The order of means that the paper finds across images (its Eq. 16)."""
EQ17 = ("sidi", "scsi", "dcsi")
"""The order of means that the paper finds under transforms (its Eq. 17)."""


def analyse(
    sets: Mapping[str, PairSet], order: Sequence[str] = EQ16, *, draws: int = 1000, seed: int = 0
) -> JsonObject:
    """Analyse the sets of one case.

    Args:
        sets: the sets by name; an empty set stays in the result, with count 0.
        order: the order of means to check; sets that are not in it are described but not tested.
        draws: bootstrap draws over images for the means; a tenth of them for the effect sizes.
        seed: seed of the bootstrap and of Shapiro-Wilk's sample.

    Returns:
        ``sets``: for each set its count, mean, standard deviation, box figures and Shapiro-Wilk; ``trend``: the order,
        the difference of each step with its interval, whether the order holds and in which share of the draws;
        ``pairs``: for each pair of sets ``dunn_minmax``, ``dunn_mean``, Kruskal-Wallis and its effect size with
        interval; ``bootstrap``: draws, images and level.
    """
    described = {}
    for name, one in sets.items():
        # Quartiles are those of the kept distances; mean and deviation are those of all pairs.
        box = dataclasses.replace(box_figures(one.kept.values), mean=one.mean, std=one.std)
        described[name] = {
            "count": one.count,
            "kept": len(one.kept),
            "box": box,
            "shapiro_wilk": shapiro_wilk(one.kept.values, seed=seed),
        }
    tested = [name for name in order if name in sets and len(sets[name].kept)]
    boot = bootstrap_means({name: sets[name].kept for name in tested}, draws=draws, seed=seed) if tested else None
    steps = []
    for a, b in itertools.pairwise(order):
        known = boot is not None and (a, b) in boot.differences
        difference = boot.differences[a, b] if known and boot else Interval(math.nan, math.nan, math.nan, 0)
        exact = sets[b].mean - sets[a].mean if a in sets and b in sets else math.nan
        steps.append({"pair": [a, b], "difference": {**plain(difference), "value": plain(exact)}})
    means = {name: one.mean for name, one in sets.items()}
    # Fewer draws for effect sizes, because each of them ranks all distances again.
    pairs = {
        f"{a}-{b}": _pair(sets[a], sets[b], max(20, draws // 10), seed) for a, b in itertools.combinations(tested, 2)
    }
    trend = {
        "order": list(order),
        "holds": trend_holds(means, order),
        "share_of_draws": boot.trend if boot and len(tested) == len(order) else math.nan,
        "steps": steps,
    }
    about = {"draws": draws, "images": boot.images if boot else 0, "level": boot.level if boot else 0.95}
    intervals = {} if boot is None else boot.means
    for name, interval in intervals.items():
        described[name]["interval"] = [interval.low, interval.high]
    made: JsonObject = plain({"sets": described, "trend": trend, "pairs": pairs, "bootstrap": about})
    return made


def _pair(first: PairSet, second: PairSet, draws: int, seed: int) -> dict[str, object]:
    """Compare two sets."""
    a, b = first.kept, second.kept
    test = kruskal_wallis(a.values, b.values)
    return {
        "dunn_minmax": dunn_minmax(a.values, b.values).value,
        "dunn_mean": dunn_mean(a.values, b.values).value,
        "kruskal_wallis": test,
        "effect": _effect(a, b, test.epsilon_squared, draws, seed),
    }


def _effect(a: DistanceSet, b: DistanceSet, value: float, draws: int, seed: int) -> Interval:
    """Give the effect size ``value`` with an interval; the interval comes from random samples of the sets."""
    drawn = bootstrap_effect(_sample(a, seed), _sample(b, seed), draws=draws, seed=seed)
    return dataclasses.replace(drawn, value=value)


def _sample(one: DistanceSet, seed: int) -> DistanceSet:
    if len(one) <= _EFFECT_PAIRS:
        return one
    rows = np.sort(np.random.default_rng(seed).choice(len(one), _EFFECT_PAIRS, replace=False))
    return DistanceSet(one.values[rows], one.left[rows], one.right[rows])
