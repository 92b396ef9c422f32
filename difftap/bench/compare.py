"""Compare two results over the same pairs by a paired bootstrap, to tell a difference from chance.

Both results are resampled in the same way, so the difficulty of a pair cancels. The p-value is two-sided: twice the
share of resamplings in which the difference has the other sign, at least ``1 / (draws + 1)`` and at most 1.

Twelve pairs or fewer are too few to resample (with one pair, all resamplings are equal). Then the p-value comes from
the exact sign-flip test: if both methods were equally good, the outcomes of each pair could be exchanged. The p-value
is the share of all ``2^n`` ways to exchange outcomes that make the difference at least as large.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.table import Table, TableColumn, result_json
from difftap.bench.bootstrap import check_draws, percentile_interval
from difftap.bench.pck import Tally, aggregate, draws
from difftap.bench.protocols import AGGREGATES
from difftap.bench.scoring import SCHEMA
from difftap.errors import InputError

__all__ = ["ComparedFigure", "Comparison", "compare", "format_comparison", "load_results", "sign_flip", "to_json"]

COMPARE_SCHEMA = "difftap.bench.compare/2"
EXACT = 12
"""The exact test is used for at most this many pairs: there are then 4096 ways to exchange outcomes."""
FEW = 20
"""Below this many pairs, a note says that they are too few."""


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of both results. PCK is a fraction, 0 to 1.

    Attributes:
        protocol: the protocol that scored it.
        alpha: the threshold.
        by: the mean, one of `AGGREGATES`.
        first: PCK of the first result over the common pairs.
        second: PCK of the second result.
        difference: ``second`` minus ``first``.
        low: lower end of the difference's interval.
        high: upper end.
        p: two-sided p-value of the hypothesis that the difference is zero.
        test: the test that gave it: ``bootstrap`` or ``sign-flip``.
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
    test: str = "bootstrap"


@dataclass(frozen=True)
class Comparison:
    """The comparison of two results over their common pairs.

    Attributes:
        rows: the figures.
        pairs: number of pairs in both.
        points: number of their keypoints.
        only_first: number of pairs that only the first result has; they are not compared.
        only_second: number of pairs that only the second has.
        draws: number of resamplings.
        level: level of the intervals, 0 to 1.
        notes: warnings, such as conditions that differ between the results.
    """

    rows: tuple[ComparedFigure, ...]
    pairs: int
    points: int
    only_first: int
    only_second: int
    draws: int
    level: float
    notes: tuple[str, ...]


def load_results(path: Path) -> JsonObject:
    """Read a results.json.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read as results ({error}); give a results.json of 'bench pck'") from error
    if schema != SCHEMA:
        raise InputError(f"'{path}' has schema {schema!r}; this difftap reads {SCHEMA!r}")
    try:
        _check_shape(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"'{path}' is damaged ({what}); score the run again: 'bench pck ... --score-only'") from error
    return dict(data)


def _check_shape(data: JsonObject) -> None:
    """Read everything that tables, plots and comparisons will read, so that a damaged file is noticed here."""
    at, counts, pairs = data["conditions"], data["counts"], data["pairs"]
    for name in ("difftap", "recipe", "recipe_key", "backend", "matching"):
        at[name]
    for value in (at["dataset"]["name"], at["model"]["name"]):
        if not isinstance(value, str):
            raise ValueError(f"a name is {value!r}")
    for name in ("pairs_scored", "pairs_failed", "points", "images"):
        int(counts[name])
    names = pairs["names"]
    for kind in ("classes", "points", "digests"):
        if len(pairs[kind]) != len(names):
            raise ValueError(f"{len(names)} pairs have {len(pairs[kind])} {kind}")
    for protocol, result in data["protocols"].items():
        for name in ("basis", "comparison", "headline", "frame", "side", "alphas"):
            result["conditions"][name]
        for name in ("alphas", "image", "point"):
            result["curve"][name]
        for name in ("calibration", "by_flag", "by_class", "pck_dagger"):
            result[name].keys()
        alphas = [alpha for alpha in result["pck"] if alpha not in ("pairs", "points")]
        for cut in (result["pck"], *result["by_class"].values(), *_cuts(result["by_flag"])):
            for alpha in alphas:
                for by in ("image", "point"):
                    cut[alpha][by]["value"]
        for alpha in alphas:
            hits = pairs["hits"][protocol][alpha]
            if len(hits) != len(names) or not all(isinstance(hit, int) for hit in hits):
                raise ValueError(f"{len(names)} pairs have {len(hits)} hits under {protocol} at {alpha}")


def _cuts(flags: Mapping[str, JsonObject]) -> list[JsonObject]:
    return [cut for values in flags.values() for cut in values.values()]


def compare(
    first: JsonObject,
    second: JsonObject,
    *,
    by: Sequence[str] = (),
    count: int = 10000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare two results under every protocol and threshold that both have.

    Args:
        first: the content of a results.json (`load_results`).
        second: the content of another.
        by: the means to compare, of `AGGREGATES`; empty for each protocol's headline.
        count: number of resamplings.
        seed: seed of the resampling.
        level: level of the intervals, 0 to 1.

    Raises:
        InputError: they have different data sets, annotations or scoring rules, or no pair, protocol or threshold in
            common.
    """
    unknown = [name for name in by if name not in AGGREGATES]
    if unknown:
        raise InputError(f"aggregate is {unknown[0]!r}; allowed: {', '.join(AGGREGATES)}")
    check_draws(count, level)
    _same_data(first, second)
    here, there = ({name: k for k, name in enumerate(one["pairs"]["names"])} for one in (first, second))
    common = [name for name in here if name in there]
    if not common:
        raise InputError("the two results have no pair in common; compare runs over the same data set and split")
    left, right = np.array([here[name] for name in common]), np.array([there[name] for name in common])
    tallies = (_Pairs(first, left), _Pairs(second, right))
    for name, one, two in zip(common, left, right, strict=True):
        # The same name may hide another annotation, for example of another release of the data set.
        if first["pairs"]["digests"][one] != second["pairs"]["digests"][two]:
            raise InputError(f"pair '{name}' is annotated differently in the two; compare runs over the same data")
    weights = draws(len(common), count, seed)
    rows = []
    for protocol, hits in first["pairs"]["hits"].items():
        other = second["pairs"]["hits"].get(protocol, {})
        _same_rules(first, second, protocol)
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
        tuple(_notes(first, second, len(common))),
    )


def _same_data(first: JsonObject, second: JsonObject) -> None:
    for key, what in (("name", "data sets"), ("split", "splits")):
        one, two = (str(result["conditions"]["dataset"].get(key, "")) for result in (first, second))
        if one != two:
            raise InputError(f"the results are of different {what}, '{one}' and '{two}'; compare runs over the same")


def _same_rules(first: JsonObject, second: JsonObject, protocol: str) -> None:
    both = [result["protocols"].get(protocol, {}).get("conditions", {}) for result in (first, second)]
    for name in ("frame", "side", "basis", "comparison", "clip"):
        if all(both) and both[0].get(name) != both[1].get(name):
            raise InputError(
                f"protocol '{protocol}' has {name} = {both[0].get(name)!r} in one result and {both[1].get(name)!r} in "
                "the other; score both again with this difftap: 'bench pck ... --score-only'"
            )


class _Pairs:
    """The counts of one result over the common pairs; ``rows`` gives the place of each in its list of pairs."""

    def __init__(self, results: JsonObject, rows: NDArray[np.int64]) -> None:
        pairs = results["pairs"]
        self._rows = rows
        self._hits = pairs["hits"]
        self.points = np.array(pairs["points"], np.int64)[rows]
        named = [pairs["classes"][row] for row in rows]
        self._classes = tuple(sorted(set(named)))
        number = {name: k for k, name in enumerate(self._classes)}
        self._members = np.array([number[name] for name in named], np.int64)

    def tally(self, protocol: str, alphas: Sequence[str]) -> Tally:
        """Give the counts under a protocol at some thresholds."""
        hits = np.stack([np.array(self._hits[protocol][alpha], np.int64)[self._rows] for alpha in alphas], axis=1)
        return Tally(self._classes, self._members, self.points, hits)


def _rows(
    protocol: str,
    alphas: Sequence[str],
    by: str,
    first: Tally,
    second: Tally,
    weights: NDArray[np.uint16],
    level: float,
) -> list[ComparedFigure]:
    values = [aggregate(tally, by) for tally in (first, second)]
    spread = aggregate(second, by, weights) - aggregate(first, by, weights)  # (B, K)
    low, high = percentile_interval(spread, level)
    below, above = (spread <= 0).sum(axis=0), (spread >= 0).sum(axis=0)
    # Two-sided. The observed data count as one more draw, so p is never below what this number of draws can show.
    p = np.minimum(2 * (np.minimum(below, above) + 1) / (len(weights) + 1), 1.0)
    test = "bootstrap"
    if len(first.points) <= EXACT:
        p, test = sign_flip(first, second, by), "sign-flip"
    return [
        ComparedFigure(
            protocol,
            float(alpha),
            by,
            float(values[0][k]),
            float(values[1][k]),
            float(values[1][k] - values[0][k]),
            float(low[k]),
            float(high[k]),
            float(p[k]),
            test,
        )
        for k, alpha in enumerate(alphas)
    ]


def sign_flip(first: Tally, second: Tally, by: str) -> NDArray[np.float64]:
    """Compute the two-sided p-values ``(K,)`` of the exact sign-flip test, for `EXACT` pairs or fewer.

    Every mean is a weighted sum of the pairs' hits, and the weights (points, classes) are the same for both results.
    So exchanging the outcomes of a pair changes the sign of its part of the difference.
    """
    count = len(first.points)
    parts = np.zeros((count, first.hits.shape[1]))
    for k in range(count):
        hits = np.zeros_like(first.hits)
        hits[k] = first.points[k]  # only this pair's points are right: the mean is then the pair's weight
        weight = np.nan_to_num(aggregate(dataclasses.replace(first, hits=hits), by))
        parts[k] = weight * (second.hits[k] - first.hits[k]) / max(1, first.points[k])
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)  # (2^n, n)
    spread, seen = np.abs(signs @ parts), np.abs(parts.sum(axis=0))
    p: NDArray[np.float64] = np.mean(spread >= seen - 1e-12, axis=0)  # sums of equal parts may differ by rounding
    return p


def _notes(first: JsonObject, second: JsonObject, pairs: int) -> list[str]:
    notes = []
    if pairs < FEW:
        notes.append(f"{pairs} pairs are too few to tell much: intervals are too narrow, and p is coarse")
    here, there = first["conditions"], second["conditions"]
    for name, what in (("dataset", "data sets' options"), ("backend", "backends"), ("difftap", "versions of difftap")):
        if here.get(name) != there.get(name):
            notes.append(f"the {what} differ")
    failed = [one["counts"]["pairs_failed"] for one in (first, second)]
    if any(failed):
        notes.append(f"pairs failed: {failed[0]} in A, {failed[1]} in B")
    return notes


def to_json(comparison: Comparison) -> JsonObject:
    """Give the comparison as plain data, with the schema's name and version first."""
    return result_json(COMPARE_SCHEMA, comparison, unit="pair")


def format_comparison(comparison: Comparison) -> list[str]:
    """Format the comparison as lines for a terminal, in percent; differences are in percentage points."""
    columns = (
        TableColumn("protocol", left=True),
        TableColumn("alpha", form="g"),
        TableColumn("mean", left=True),
        TableColumn("A", "%", ".2f"),
        TableColumn("B", "%", ".2f"),
        TableColumn("B - A", "%", "+.2f", unit_shown=False),
        TableColumn(f"{100 * comparison.level:g} % interval"),
        TableColumn("p", form=".4f"),
    )
    rows = []
    for row in comparison.rows:
        span = f"{100 * row.low:+.2f} to {100 * row.high:+.2f}"
        rows.append((row.protocol, row.alpha, row.by, row.first, row.second, row.difference, span, row.p))
    lines = [
        f"{comparison.pairs} common pairs, {comparison.points} points; {comparison.only_first} pairs in A alone, "
        f"{comparison.only_second} in B alone",
        *Table(columns, tuple(rows)).text(),
    ]
    exact = any(row.test == "sign-flip" for row in comparison.rows)
    lines.append(
        f"paired bootstrap over pairs, {comparison.draws} draws"
        + ("; p by the exact sign-flip test" if exact else "")
        + "; pairs share images, so p is somewhat too small"
    )
    return [*lines, *(f"note: {note}" for note in comparison.notes)]
