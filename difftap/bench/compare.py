"""Two results over the same pairs: is the difference real? A paired bootstrap over pairs.

Both results are resampled alike, so what makes a pair hard for both cancels. The p-value is two-sided: twice the share
of resamplings on the far side of zero, at least ``1 / (draws + 1)``, at most 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.bench.pck import Tally, aggregate, draws
from difftap.bench.protocols import AGGREGATES
from difftap.bench.scoring import SCHEMA
from difftap.errors import InputError

__all__ = ["Comparison", "Row", "compare", "format_comparison", "load_results", "to_json"]

COMPARE_SCHEMA = "difftap.bench.compare/1"


@dataclass(frozen=True)
class Row:
    """One figure of both results.

    Attributes:
        protocol: under which it was scored.
        alpha: the threshold.
        by: which mean, one of `AGGREGATES`.
        first: PCK of the first result over the common pairs.
        second: of the second.
        difference: second less first.
        low: lower bound of the difference's interval.
        high: upper bound.
        p: two-sided p-value of the difference being zero.
    """

    protocol: str
    alpha: float
    by: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, and how they differ.

    Attributes:
        rows: the figures.
        pairs: pairs in both.
        points: their keypoints.
        only_first: pairs of the first result alone; they have no say.
        only_second: of the second alone.
        draws: resamplings.
        level: of the intervals.
        notes: conditions of the two that differ where they had better not.
    """

    rows: tuple[Row, ...]
    pairs: int
    points: int
    only_first: int
    only_second: int
    draws: int
    level: float
    notes: tuple[str, ...]


def load_results(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' cannot be read as results ({error}); give a results.json of 'bench pck'") from error
    if schema != SCHEMA:
        raise InputError(f"'{path}' has schema {schema!r}; this difftap reads {SCHEMA!r}")
    return dict(data)


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    by: Sequence[str] = (),
    count: int = 10000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare two results under every protocol and threshold that both hold.

    Args:
        first: a results.json, read.
        second: another.
        by: means to compare, of `AGGREGATES`; none for each protocol's headline.
        count: resamplings.
        seed: of the resampling.
        level: of the intervals.

    Raises:
        InputError: they have no pair, no protocol or no threshold in common, or count a pair's points differently.
    """
    unknown = [name for name in by if name not in AGGREGATES]
    if unknown:
        raise InputError(f"aggregate is {unknown[0]!r}; allowed: {', '.join(AGGREGATES)}")
    if count < 1 or not 0 < level < 1:
        raise InputError(f"draws is {count} and level {level}; allowed: 1 or more, and between 0 and 1")
    here, there = ({name: k for k, name in enumerate(one["pairs"]["names"])} for one in (first, second))
    common = [name for name in here if name in there]
    if not common:
        raise InputError("the two results have no pair in common; compare runs over the same data set and split")
    left, right = np.array([here[name] for name in common]), np.array([there[name] for name in common])
    tallies = (_Pairs(first, left), _Pairs(second, right))
    differing = np.flatnonzero(tallies[0].points != tallies[1].points)
    if len(differing):
        raise InputError(
            f"pair '{common[differing[0]]}' has {tallies[0].points[differing[0]]} points in one and "
            f"{tallies[1].points[differing[0]]} in the other; the results are of different annotations"
        )
    weights = draws(len(common), count, seed)
    rows = []
    for protocol, hits in first["pairs"]["hits"].items():
        other = second["pairs"]["hits"].get(protocol, {})
        means = by or [first["protocols"][protocol]["conditions"]["headline"]]
        alphas = [alpha for alpha in hits if alpha in other]
        if alphas:
            counted = [one.tally(protocol, alphas) for one in tallies]
            for mean in means:
                rows += _rows(protocol, alphas, mean, counted[0], counted[1], weights, level)
    if not rows:
        raise InputError("the two results share no protocol and threshold; score both under the same --protocol")
    return Comparison(
        tuple(rows),
        len(common),
        int(tallies[0].points.sum()),
        len(here) - len(common),
        len(there) - len(common),
        count,
        level,
        tuple(_notes(first, second)),
    )


class _Pairs:
    """One result's counts over the common pairs."""

    def __init__(self, results: Mapping[str, Any], rows: NDArray[np.int64]) -> None:
        pairs = results["pairs"]
        self._rows = rows
        self._hits = pairs["hits"]
        self.points = np.array(pairs["points"], np.int64)[rows]
        named = [pairs["classes"][row] for row in rows]
        self._classes = tuple(sorted(set(named)))
        number = {name: k for k, name in enumerate(self._classes)}
        self._members = np.array([number[name] for name in named], np.int64)

    def tally(self, protocol: str, alphas: Sequence[str]) -> Tally:
        hits = np.stack([np.array(self._hits[protocol][alpha], np.int64)[self._rows] for alpha in alphas], axis=1)
        return Tally(self._classes, self._members, self.points, hits)


def _rows(
    protocol: str, alphas: Sequence[str], by: str, first: Tally, second: Tally, weights: NDArray[Any], level: float
) -> list[Row]:
    values = [aggregate(tally, by) for tally in (first, second)]
    spread = aggregate(second, by, weights) - aggregate(first, by, weights)  # (B, K)
    low, high = np.nanquantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
    below, above = (spread <= 0).sum(axis=0), (spread >= 0).sum(axis=0)
    # Two-sided, and never below what so many draws can tell: the observed data count as one of them.
    p = np.minimum(2 * (np.minimum(below, above) + 1) / (len(weights) + 1), 1.0)
    return [
        Row(
            protocol,
            float(alpha),
            by,
            float(values[0][k]),
            float(values[1][k]),
            float(values[1][k] - values[0][k]),
            float(low[k]),
            float(high[k]),
            float(p[k]),
        )
        for k, alpha in enumerate(alphas)
    ]


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    notes = []
    here, there = first["conditions"], second["conditions"]
    for name, what in (("dataset", "data sets"), ("backend", "backends"), ("difftap", "versions of difftap")):
        if here.get(name) != there.get(name):
            notes.append(f"the {what} differ")
    failed = [one["counts"]["pairs_failed"] for one in (first, second)]
    if any(failed):
        notes.append(f"pairs failed: {failed[0]} in A, {failed[1]} in B")
    return notes


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, with the schema's name and version first."""
    fields = {name: getattr(comparison, name) for name in comparison.__dataclass_fields__ if name != "rows"}
    rows = [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in comparison.rows]
    return {"schema": COMPARE_SCHEMA, "unit": "pair", **fields, "rows": rows}


def format_comparison(comparison: Comparison) -> list[str]:
    """Lines for a terminal; percent, and the difference in percentage points."""
    lines = [
        f"{comparison.pairs} common pairs, {comparison.points} points; {comparison.only_first} pairs in A alone, "
        f"{comparison.only_second} in B alone",
        f"{'protocol':16}{'alpha':>7}  {'mean':12}{'A %':>8}{'B %':>8}{'B - A':>8}"
        f"{f'{100 * comparison.level:g} % interval':>20}{'p':>9}",
    ]
    for row in comparison.rows:
        span = f"{100 * row.low:+.2f} to {100 * row.high:+.2f}"
        figures = f"{100 * row.first:>8.2f}{100 * row.second:>8.2f}{100 * row.difference:>+8.2f}{span:>20}{row.p:>9.4f}"
        lines.append(f"{row.protocol:16}{row.alpha:>7g}  {row.by:12}{figures}")
    lines.append(
        f"paired bootstrap over pairs, {comparison.draws} draws; pairs share images, so p is somewhat too small"
    )
    return [*lines, *(f"note: {note}" for note in comparison.notes)]
