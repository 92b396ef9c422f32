"""From sets of distances to what is reported of them, as plain data: figures of boxes, trends, indices, tests."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difftap.study.bootstrap import DistanceSet, Interval, bootstrap_effect, bootstrap_means
from difftap.study.sets import PairSet
from difftap.study.statistics import (
    box_figures,
    dunn_mean,
    dunn_minmax,
    kruskal_wallis,
    shapiro_wilk,
    trend_holds,
)

_EFFECT_PAIRS = 20_000
"""Pairs of a set that the effect size's interval is drawn from: it ranks them anew in every draw."""

__all__ = ["EQ16", "EQ17", "analyse", "plain"]

EQ16 = ("scsi", "scdi", "dcsi", "dcdi")
"""The order of means that the paper finds across images (its Eq. 16)."""
EQ17 = ("sidi", "scsi", "dcsi")
"""The order that it finds under transforms (its Eq. 17)."""


def plain(value: Any) -> Any:
    """Data ready for strict JSON: dataclasses as objects, what is not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def analyse(
    sets: Mapping[str, PairSet], order: Sequence[str] = EQ16, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All that is said of one case.

    Args:
        sets: by name; empty ones stay in, with count 0.
        order: the means' order to check; sets beyond it are described, not tested.
        draws: bootstrap draws over images for the means; a tenth of them for the effect sizes.
        seed: of bootstrap and Shapiro-Wilk's sample.

    Returns:
        ``sets``: by set its count, mean, standard deviation, box figures and Shapiro-Wilk; ``trend``: the order, each
        step's difference with its interval, whether it holds and in which share of the draws; ``pairs``: by pair of
        sets ``dunn_minmax``, ``dunn_mean``, Kruskal-Wallis and its effect size with interval; ``bootstrap``.
    """
    described = {}
    for name, one in sets.items():
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
    made: dict[str, Any] = plain({"sets": described, "trend": trend, "pairs": pairs, "bootstrap": about})
    return made


def _pair(first: PairSet, second: PairSet, draws: int, seed: int) -> dict[str, Any]:
    """What is said of two sets."""
    a, b = first.kept, second.kept
    test = kruskal_wallis(a.values, b.values)
    return {
        "dunn_minmax": dunn_minmax(a.values, b.values).value,
        "dunn_mean": dunn_mean(a.values, b.values).value,
        "kruskal_wallis": test,
        "effect": _effect(a, b, test.epsilon_squared, draws, seed),
    }


def _effect(a: DistanceSet, b: DistanceSet, value: float, draws: int, seed: int) -> Interval:
    """The effect size of all pairs, with the interval that seeded samples of them give."""
    drawn = bootstrap_effect(_sample(a, seed), _sample(b, seed), draws=draws, seed=seed)
    return dataclasses.replace(drawn, value=value)


def _sample(one: DistanceSet, seed: int) -> DistanceSet:
    if len(one) <= _EFFECT_PAIRS:
        return one
    rows = np.sort(np.random.default_rng(seed).choice(len(one), _EFFECT_PAIRS, replace=False))
    return DistanceSet(one.values[rows], one.left[rows], one.right[rows])
