"""The one way in which these scripts time: warmed up, in turns, median and spread, memory in a process of its own."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata

import numpy as np

from difftap.artifacts.table import Cell, Table, TableColumn
from difftap.bench.workers import Timing, Worker, blas, hold_threads
from difftap.machine import available_cores, cpu

Way = Callable[[], object]


def count(text: str) -> int:
    """Read a whole number above 0 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number above 0")
    return value


def measure(ways: Mapping[str, Way], repeats: int, threads: int = 2, calls: int = 1) -> dict[str, Timing]:
    """Time every way in turn, so that whatever else the machine does falls on all of them.

    Args:
        ways: what is timed, by name; each runs once before, as warm-up.
        repeats: rounds.
        threads: for BLAS and torch.
        calls: of each way in a round; more than one for ways so short that a single call says little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with hold_threads(threads):
        for way in ways.values():
            way()
        for _ in range(repeats):
            for name, way in ways.items():
                for _ in range(calls):
                    start = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(spent) for name, spent in seconds.items()}


def peak(place: str, threads: int = 2, **arguments: object) -> int:
    """Measure by how many bytes a call grows the memory of a fresh process.

    Args:
        place: ``module:function``, which prepares with ``arguments`` and gives back the call that is measured.
        threads: for BLAS and torch.
        arguments: plain data.
    """
    with Worker(threads) as worker:
        return int(worker.ask("peak", place=place, arguments=arguments)["peak"])


def product_rate(threads: int, side: int = 1024) -> float:
    """Measure the rate of a float64 matrix product ``(side, side) x (side, side)``, in operations a second.

    A multiply-add is two operations. The best of several: what the processor can do when nothing disturbs it.
    """
    left, right = np.random.default_rng(0).standard_normal((2, side, side))
    best = measure({"product": lambda: left @ right}, 5, threads).popitem()[1].low
    return 2 * side**3 / best


def table(
    title: str,
    times: Mapping[str, Timing],
    ours: str,
    peaks: Mapping[str, int] | None = None,
    floor: tuple[str, float] | None = None,
) -> Table:
    """Lay out medians, spread, how many times faster ``ours`` is, and peak memory.

    Args:
        title: what was timed.
        times: of every way, by name.
        ours: the way that the others are compared with.
        peaks: bytes of every way, where they were measured.
        floor: a last row that was worked out and not timed: its name, and the seconds below which no way can come.
    """
    columns = (
        TableColumn("way", left=True),
        *(TableColumn(head, "ms", ".1f") for head in ("median", "low", "high")),
        TableColumn("difftap is x faster", form=".2f"),
        TableColumn("peak", "MB", ".0f"),
    )
    own = times[ours].median
    rows: list[tuple[Cell, ...]] = [
        (name, one.median, one.low, one.high, one.median / own, (peaks or {}).get(name)) for name, one in times.items()
    ]
    if floor is not None:
        rows.append((floor[0], floor[1], None, None, floor[1] / own, None))
    return Table(columns, tuple(rows), title)


def conditions(threads: int, *packages: str) -> str:
    """Say on what was measured: processor, cores, load, versions."""
    versions = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("numpy", *packages))]
    return (
        f"{cpu()}, {available_cores()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}; "
        f"{', '.join(versions)}; {blas()}"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
