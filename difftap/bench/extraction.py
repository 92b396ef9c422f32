"""What extraction itself costs: streaming, storing and bookkeeping beside engines that take a set time.

Wall time over the engines' own time, measured inside them. The networks take turns, as they always do, so that nothing
is hidden by running them at once; decoding and writing are the real ones, on made pictures and maps. The wall time has
three parts: before an engine first runs (a store is begun), the steady state, and after the last run (the last shard is
written, the store finished). The first and the last come once a run, however many images there are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from difftap.bench.fakeengine import FakePipeline, made_source
from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.store.writer import shard_rows
from difftap.machine import available_cores, cpu, resident_memory

__all__ = ["SHAPE", "Pace", "format_course", "format_paces", "measure", "run", "to_json"]

SHAPE = (16, 8, 8)
"""``(C, h, w)`` of the maps, unless told."""

_SAMPLES = 20  # points of the memory's course that are kept


@dataclass(frozen=True)
class Pace:
    """One measured run.

    Attributes:
        engine: seconds that the engines were set to take for an image.
        images: how many were extracted.
        seconds: wall time of the run, store opened and finished inside.
        busy: seconds spent in the engines.
        overhead: the rest over ``busy``: what extraction adds, beginning and end included.
        opening: seconds before an engine first ran.
        steady: as ``overhead``, from the first run's begin to the last one's end: what extraction adds to each image.
        closing: seconds after the last run.
        rate: images a second.
        memory: resident bytes over the run, evenly spaced, from the first tenth on.
        growth: bytes an image that the resident memory grew by, from the second half of the run.
    """

    engine: float
    images: int
    seconds: float
    busy: float
    overhead: float
    opening: float
    steady: float
    closing: float
    rate: float
    memory: tuple[int, ...]
    growth: float


def measure(
    seconds: float,
    images: int,
    folder: Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    progress: Callable[[int], None] = lambda count: None,
) -> Pace:
    """Extract so many made pictures with engines that take ``seconds`` each.

    Args:
        folder: an existing one; the store is made there and left.
        shape: ``(C, h, w)`` of the maps.
        progress: as `extract_to_store` takes it.
    """
    pipeline, source = FakePipeline(seconds, shape), made_source(images)
    settings = ExtractSettings(shard=shard_rows(prod(shape) * 2))  # as a real recipe with such maps has it, in float16
    course: list[tuple[int, int]] = []
    done = 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        if count:  # at every image, the notes would be what grows
            course.append((done, resident_memory()))
            progress(count)

    began = time.perf_counter()
    extract_to_store(pipeline, source, folder / "store.zarr", settings, progress=note)
    ended = time.perf_counter()
    wall, busy = ended - began, pipeline.busy
    first, last = pipeline.span
    steady = (last - first) / busy - 1
    settled = [point for point in course if point[0] >= images / 10] or course
    step = max(1, len(settled) // _SAMPLES)
    # The last note comes after the store was finished, which takes some memory for itself, once.
    half = [point for point in settled[:-1] if point[0] >= images / 2] or settled
    (early, low), (late, high) = half[0], half[-1]
    growth = (high - low) / (late - early) if late > early else 0.0
    memory = tuple(size for _, size in settled[::step])
    parts = (first - began, steady, ended - last)
    return Pace(seconds, images, wall, busy, wall / busy - 1, *parts, images / wall, memory, growth)


def run(
    engines: tuple[float, ...],
    seconds: float,
    repeats: int,
    progress: Callable[[int], None] = lambda count: None,
    *,
    shape: tuple[int, int, int] = SHAPE,
) -> list[list[Pace]]:
    """Measure several engines side by side: in each round every one of them, for about ``seconds``."""
    rounds: list[list[Pace]] = []
    for _ in range(repeats + 1):
        paces = []
        for engine in engines:
            with tempfile.TemporaryDirectory(prefix="difftap-") as folder:
                paces.append(measure(engine, max(20, round(seconds / engine)), Path(folder), shape=shape))
        rounds.append(paces)
        progress(1)
    return rounds[1:]  # the first is the warm-up


def format_paces(rounds: list[list[Pace]]) -> list[str]:
    """A line for each engine: medians over the rounds, and the spread of the steady overhead."""
    heads = (
        "engine ms",
        "images",
        "images/s",
        "steady %",
        "lowest",
        "highest",
        "us/image",
        "begin s",
        "end s",
        "whole %",
    )
    lines = [" ".join(f"{head:>9}" for head in heads)]
    for paces in zip(*rounds, strict=True):
        steady = sorted(100 * pace.steady for pace in paces)
        each = median(1e6 * pace.steady * pace.busy / pace.images for pace in paces)
        opening, closing = median(pace.opening for pace in paces), median(pace.closing for pace in paces)
        lines.append(
            f"{1000 * paces[0].engine:9.1f} {paces[0].images:9d} {median(p.rate for p in paces):9.1f} "
            f"{median(steady):9.2f} {steady[0]:9.2f} {steady[-1]:9.2f} {each:9.0f} {opening:9.2f} {closing:9.2f} "
            f"{median(100 * pace.overhead for pace in paces):9.2f}"
        )
    return [*lines, "steady: over the engines' time, while they run; begin, end: once a run, however long it is"]


def format_course(pace: Pace) -> list[str]:
    """How the resident memory went over a long run."""
    shown = " ".join(f"{size / 1e6:.0f}" for size in pace.memory)
    return [
        f"{pace.images:,} images in {pace.seconds:.1f} s, {pace.rate:.1f} images/s, overhead "
        f"{100 * pace.steady:.2f} % of {1000 * pace.engine:.1f} ms engines while they run, "
        f"{pace.opening:.2f} s before and {pace.closing:.2f} s after",
        f"resident MB from the first tenth on: {shown}",
        f"growth over the second half: {pace.growth:.0f} bytes an image",
    ]


def to_json(rounds: list[list[Pace]]) -> dict[str, Any]:
    """Plain data, with the machine."""
    return {
        "type": "bench extract",
        "machine": {"cpu": cpu(), "cores": available_cores()},
        "rounds": [[asdict(pace) for pace in paces] for paces in rounds],
    }
