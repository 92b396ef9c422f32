"""Distances of all pairs side by side with what computes them one by one: time and agreement, in one run.

``dcor`` against the dcor package, which takes pair after pair (``pairs``) or many pairs on all cores (``rowwise``); a
sample of its pairs is timed and its time scaled to all, since all would take minutes. The other metrics against
scipy's ``cdist``. Rounds take turns, so that whatever else the machine does falls on all.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.bench.host import blas, hold_threads
from difftap.bench.matching import Timing
from difftap.errors import InputError, require
from difftap.machine import available_cores, cpu
from difftap.retrieval.distances import METRICS, pairwise

__all__ = ["SCHEMA", "DistanceBench", "Rival", "format_table", "run", "to_json"]

SCHEMA = "difftap.bench.distances/1"
_SCIPY = {"euclidean": "euclidean", "manhattan": "cityblock", "cosine": "cosine", "correlation": "correlation"}


@dataclass(frozen=True)
class Rival:
    """Another way to the same table.

    Attributes:
        name: package and function.
        seconds: for the pairs it was given, by round.
        pairs: how many pairs these were.
        table_seconds: median of ``seconds``, scaled to all pairs.
        gap: largest difference from ours on these pairs.
    """

    name: str
    seconds: tuple[float, ...]
    pairs: int
    table_seconds: float
    gap: float


@dataclass(frozen=True)
class DistanceBench:
    """The result.

    Attributes:
        vectors: N.
        width: D.
        times: of our whole table, by metric.
        rivals: by metric.
        ratios: how many times faster ours is than the fastest rival, by metric.
        conditions: versions, processor, threads, load, what is inside.
    """

    vectors: int
    width: int
    times: dict[str, Timing]
    rivals: dict[str, list[Rival]]
    ratios: dict[str, float]
    conditions: dict[str, Any]


def run(
    vectors: int = 500,
    width: int = 1280,
    metrics: tuple[str, ...] = ("dcor",),
    pairs: int = 2000,
    threads: int = 2,
    repeats: int = 3,
    device: str = "cpu",
) -> DistanceBench:
    """Measure all pairs of seeded random vectors.

    Args:
        vectors: N.
        width: D.
        metrics: some of `METRICS`.
        pairs: pairs that the dcor package is given in each round.
        threads: for BLAS and the dcor package.
        repeats: rounds.
        device: ours runs there; the others know the CPU alone.

    Raises:
        MissingExtraError: scipy, dcor (for ``dcor``) or threadpoolctl is not installed.
    """
    if vectors < 2 or min(width, pairs, repeats, threads) < 1:
        raise InputError("at least 2 vectors are needed, and 1 or more of everything else")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise InputError(f"metric is '{unknown[0] if unknown else ''}'; allowed: {', '.join(METRICS)}")
    drawn = np.random.default_rng(0).standard_normal((vectors, width)) + np.linspace(-1, 1, width)
    x = drawn.astype(np.float32)
    load = os.getloadavg()
    times, rivals = {}, {}
    with hold_threads(threads):
        for metric in metrics:
            others = _dcor_ways(x, pairs, threads) if metric == "dcor" else _scipy_ways(x, metric)
            times[metric], rivals[metric] = _rounds(x, metric, others, repeats, device)
        versions = {name: _version(name) for name in ("scipy", "dcor")} | {"numpy": np.__version__}
    return DistanceBench(
        vectors,
        width,
        times,
        rivals,
        {name: min(one.table_seconds for one in rivals[name]) / times[name].median for name in metrics},
        {
            "versions": {"python": platform.python_version(), **versions},
            "blas": blas(),
            "cpu": cpu(),
            "cores": available_cores(),
            "threads": threads,
            "device": device,
            "load_before": load[0],
            "load_after": os.getloadavg()[0],
            "warm_up": "one call of each way; the dcor package compiles itself then",
            "inside": "from float32 vectors in memory to the table of distances",
        },
    )


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


Way = tuple[str, Callable[[], NDArray[Any]], NDArray[np.int64]]


def _scipy_ways(x: NDArray[np.float32], metric: str) -> list[Way]:
    spatial = require("scipy.spatial.distance", "bench", "the comparison with scipy")
    every = np.array(np.triu_indices(len(x), 1))
    double = x.astype(np.float64)
    return [
        ("scipy cdist", lambda: np.asarray(spatial.cdist(double, double, _SCIPY[metric])[every[0], every[1]]), every)
    ]


def _dcor_ways(x: NDArray[np.float32], pairs: int, threads: int) -> list[Way]:
    package = require("dcor", "bench", "the comparison with the dcor package")
    numba = require("numba", "bench", "the comparison with the dcor package")
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    every = np.array(np.triu_indices(len(x), 1))
    chosen = every[:, np.random.default_rng(1).permutation(every.shape[1])[:pairs]]
    first, second = x[chosen[0]].astype(np.float64), x[chosen[1]].astype(np.float64)

    def one_by_one() -> NDArray[Any]:
        alike = [package.distance_correlation(a, b) for a, b in zip(first, second, strict=True)]
        return 1.0 - np.array(alike)

    def rowwise() -> NDArray[Any]:
        mode = package.CompileMode.COMPILE_PARALLEL
        return np.asarray(1.0 - package.rowwise(package.distance_correlation, first, second, compile_mode=mode))

    return [("dcor distance_correlation", one_by_one, chosen), ("dcor rowwise, parallel", rowwise, chosen)]


def _rounds(
    x: NDArray[np.float32], metric: str, ways: list[Way], repeats: int, device: str
) -> tuple[Timing, list[Rival]]:
    """Time every way in turn."""
    table = pairwise(x, metric=metric, device=device)  # warm-up
    gaps = [float(np.abs(way() - table[at[0], at[1]]).max()) for _, way, at in ways]
    ours: list[float] = []
    theirs: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        start = time.perf_counter()
        pairwise(x, metric=metric, device=device)
        ours.append(time.perf_counter() - start)
        for seconds, (_, way, _) in zip(theirs, ways, strict=True):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    every = len(x) * (len(x) - 1) // 2
    rivals = [
        Rival(name, tuple(seconds), at.shape[1], float(np.median(seconds)) * every / at.shape[1], gap)
        for (name, _, at), seconds, gap in zip(ways, theirs, gaps, strict=True)
    ]
    return Timing.of(ours), rivals


def format_table(result: DistanceBench) -> list[str]:
    """The result for people."""
    conditions = result.conditions
    lines = [
        f"{result.vectors} vectors of {result.width}, all pairs; {conditions['cpu']}, {conditions['threads']} threads, "
        f"load {conditions['load_before']:.1f} before"
    ]
    for metric, timing in result.times.items():
        lines.append(f"{metric}: {timing.median:.3f} s ({timing.low:.3f} to {timing.high:.3f})")
        for rival in result.rivals[metric]:
            scaled = f", from {rival.pairs} pairs" if rival.pairs < result.vectors * (result.vectors - 1) // 2 else ""
            lines.append(
                f"  {rival.name}: {rival.table_seconds:.3f} s{scaled}; {rival.table_seconds / timing.median:.1f} times "
                f"ours; largest difference {rival.gap:.1e}"
            )
    return lines


def to_json(result: DistanceBench) -> dict[str, Any]:
    """Plain data."""
    return {"schema": SCHEMA, **asdict(result)}
