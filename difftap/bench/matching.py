"""Dense matching side by side with the slow way: time, peak memory, agreement, and the floor set by arithmetic.

Three ways find the same keypoints in the same pair of random maps, one after another in every round of one run:

``dift``
    as DIFT's evaluation does it, in torch: both maps enlarged to image size, then for each keypoint the whole enlarged
    target normalised, multiplied and searched.
``once``
    the same, but normalised once for all keypoints: the fairer rival.
``difftap``
    `difftap.matching.match_points` from bare maps, norms included; also with the target prepared beforehand, and with
    confidence (margin and cycle error), which the slow ways do not compute.

Memory is measured in one fresh child process per way, over what the process held once its inputs were made.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.bench.host import blas, hold_threads
from difftap.bench.matching_ways import Case, peak_in_child, require_torch, slow_way
from difftap.coords import Size
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.machine import available_cores, cpu
from difftap.matching import Joining, match_points
from difftap.recipe import Matcher

__all__ = ["SCHEMA", "Case", "MatchingBench", "Timing", "format_table", "run", "to_json"]

SCHEMA = "difftap.bench.matching/1"
_FAST_CALLS = 5  # calls of the fast way in each round; its calls are too short for one to say much


@dataclass(frozen=True)
class Timing:
    """Wall time of one way, warmed up.

    Attributes:
        seconds: every measured call, in order.
        median: of `seconds`.
        low: the fastest.
        high: the slowest.
    """

    seconds: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise measured calls."""
        return cls(tuple(seconds), statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class MatchingBench:
    """The result; times in seconds, memory in bytes.

    Attributes:
        case: what was matched.
        times: by way: ``dift``, ``dift-search`` (without enlarging), ``once``, ``difftap``, ``difftap-prepared``,
            ``difftap-confidence``.
        ratios: how many times faster ``difftap`` is, by median: ``dift``, ``dift-search`` (their enlarging left out,
            our norms left in), ``once``.
        memory: peak growth by way: ``dift``, ``once``, ``difftap``; None where memory was not measured.
        same_pixels: keypoints for which ``dift`` and ``difftap`` return the same pixel.
        largest_gap: largest cosine, exact, by which the pixel of ``dift`` falls short of ours; rounding makes it.
        floor_flops: floating-point operations that the method cannot avoid.
        flops_rate: float64 operations per second of a matrix product in the same run.
        floor_share: the floor's time as a share of the median of ``difftap``.
        conditions: versions, processor, threads, load, warm-up, repeats.
    """

    case: Case
    times: dict[str, Timing]
    ratios: dict[str, float]
    memory: dict[str, int] | None
    same_pixels: int
    largest_gap: float
    floor_flops: float
    flops_rate: float
    floor_share: float
    conditions: dict[str, Any]


def run(
    channels: int = 1280,
    grid: int = 48,
    image: Size = (500, 375),
    keypoints: int = 10,
    threads: int = 2,
    repeats: int = 3,
    *,
    interpolation: str = "bilinear",
    memory: bool = True,
) -> MatchingBench:
    """Measure the slow ways and ours side by side; see the module's docstring.

    Args:
        channels: of the maps.
        grid: side of the square maps, in cells.
        image: ``(W, H)`` of both images.
        keypoints: number of points to find.
        threads: for BLAS and torch.
        repeats: rounds; each runs every way, the slow ones once.
        interpolation: ``bilinear`` or ``bicubic``.
        memory: also measure peak memory, in child processes.

    Raises:
        MissingExtraError: torch or threadpoolctl is not installed.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; allowed: a whole number above 0")
    case = Case(channels, grid, image, keypoints, interpolation, threads)
    source, target, points = case.inputs()
    load = os.getloadavg()
    torch = require_torch()
    with hold_threads(threads):
        ways = _ways(source, target, points, Matcher("dense", interpolation))
        for way in ways.values():  # warm-up
            way()
        slow_way(source, target, points[:1], interpolation, False)
        times = _rounds(case, ways, source, target, points, repeats)
        slow = slow_way(source, target, points, interpolation, False)[0]
        rate = _flops_rate()
        versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    ours = match_points(source, target, points, Matcher("dense", interpolation), confidence=False).target
    own = times["difftap"].median
    flops = _floor_flops(case)
    return MatchingBench(
        case=case,
        times=times,
        ratios={name: times[name].median / own for name in ("dift", "dift-search", "once")},
        memory={name: peak_in_child(name, case) for name in ("dift", "once", "difftap")} if memory else None,
        same_pixels=int((slow == ours).all(axis=1).sum()),
        largest_gap=_largest_gap(source, target, points, slow, ours, interpolation),
        floor_flops=flops,
        flops_rate=rate,
        floor_share=flops / rate / own,
        conditions={
            "versions": versions,
            "blas": blas(),
            "cpu": cpu(),
            "cores": available_cores(),
            "threads": threads,
            "load_before": load[0],
            "load_after": os.getloadavg()[0],
            "warm_up": "one call of each fast way, and of the slow way on one keypoint",
            "repeats": repeats,
            "calls_per_round": {"slow": 1, "fast": _FAST_CALLS},
            "inside": "from maps in memory to pixels: enlarging or norms, products, search",
        },
    )


def _ways(
    source: FeatureMap, target: FeatureMap, points: NDArray[np.int64], matcher: Matcher
) -> dict[str, Callable[[], object]]:
    """The fast ways, as calls."""
    joining = Joining(matcher)
    ready = joining.ready([target])
    return {
        "difftap": lambda: match_points(source, target, points, matcher, confidence=False),
        "difftap-prepared": lambda: joining.ready([source]).match(ready, points, confidence=False),
        "difftap-confidence": lambda: match_points(source, target, points, matcher),
    }


def _rounds(
    case: Case,
    ways: dict[str, Callable[[], object]],
    source: FeatureMap,
    target: FeatureMap,
    points: NDArray[np.int64],
    repeats: int,
) -> dict[str, Timing]:
    """Time every way in turn, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ("dift", "dift-search", "once", *ways)}
    for _ in range(repeats):
        for name, once in (("dift", False), ("once", True)):
            _, enlarging, searching = slow_way(source, target, points, case.interpolation, once)
            seconds[name].append(enlarging + searching)
            if name == "dift":
                seconds["dift-search"].append(searching)
        for name, way in ways.items():
            for _ in range(_FAST_CALLS):
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _largest_gap(
    source: FeatureMap,
    target: FeatureMap,
    points: NDArray[np.int64],
    slow: NDArray[np.float64],
    ours: NDArray[np.float64],
    interpolation: str,
) -> float:
    """By how much the slow way's pixel scores below ours, at most, where the two differ."""
    joining = Joining(Matcher("dense", interpolation))
    first, second = joining.ready([source]), joining.ready([target])
    gaps = [0.0]
    for point, (x, y), (x2, y2) in zip(points, slow.astype(int), ours.astype(int), strict=True):
        if (x, y) != (x2, y2):
            heat = first.heat(second, point)
            gaps.append(float(heat[y2, x2] - heat[y, x]))
    return max(gaps)


def _floor_flops(case: Case) -> float:
    """Products of keypoints with cells, Gram products of neighbouring cells, and both interpolations of each point."""
    cells = case.grid**2
    width, height = case.image
    grams = 5 if case.interpolation == "bilinear" else 25
    taps = 2 if case.interpolation == "bilinear" else 4
    dots = (case.keypoints + grams) * case.channels * cells
    reading = (case.keypoints + 1) * taps * width * (case.grid + height)  # + 1: the norm image, at least once
    return 2.0 * (dots + reading)


def _flops_rate() -> float:
    """Operations per second of a float64 matrix product of 1024 x 1024, best of five."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 1024, 1024))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return float(2 * 1024**3 / best)


def to_json(result: MatchingBench) -> dict[str, Any]:
    """The result as plain data, with the schema's name and version first."""
    return {"schema": SCHEMA, **{f.name: _plain(getattr(result, f.name)) for f in fields(result)}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return asdict(value) if isinstance(value, Case | Timing) else value


def format_table(result: MatchingBench) -> list[str]:
    """The result as lines of text for a terminal."""
    case, times = result.case, result.times
    labels = {
        "dift": "slow, as DIFT's evaluation",
        "dift-search": "  of that, without enlarging",
        "once": "slow, normalised once",
        "difftap": "difftap",
        "difftap-prepared": "difftap, target prepared",
        "difftap-confidence": "difftap, with confidence",
    }
    lines = [
        f"dense matching, {case.interpolation}: {case.channels} channels, {case.grid} x {case.grid} cells -> "
        f"{case.image[0]} x {case.image[1]} pixels, {case.keypoints} keypoints, {case.threads} threads",
        f"{'way':30}{'median ms':>11}{'low':>10}{'high':>10}{'calls':>7}{'difftap is':>13}{'peak MB':>9}",
    ]
    for name, label in labels.items():
        timing = times[name]
        ratio = f"{result.ratios[name]:.0f} x faster" if name in result.ratios else ""
        peak = f"{result.memory[name] / 1e6:.0f}" if result.memory and name in result.memory else ""
        figures = "".join(
            f"{1e3 * seconds:>{width}.1f}"
            for seconds, width in ((timing.median, 11), (timing.low, 10), (timing.high, 10))
        )
        lines.append(f"{label:30}{figures}{len(timing.seconds):>7}{ratio:>13}{peak:>9}".rstrip())
    conditions = result.conditions
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    return [
        *lines,
        f"same pixel for {result.same_pixels} of {case.keypoints} keypoints; largest gap {result.largest_gap:.1e}",
        f"floor: {result.floor_flops / 1e6:.0f} MFLOP at {result.flops_rate / 1e9:.0f} GFLOP/s (float64) is "
        f"{1e3 * result.floor_flops / result.flops_rate:.1f} ms, {100 * result.floor_share:.0f} % of difftap's time",
        f"{conditions['cpu']}, {conditions['cores']} cores, load {conditions['load_before']:.1f} to "
        f"{conditions['load_after']:.1f}; {versions}; {conditions['blas']}",
        f"warm-up: {conditions['warm_up']}; timed: {conditions['inside']}",
    ]
