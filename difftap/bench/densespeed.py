"""How fast dense matching goes from cached maps: pairs a second and peak memory, on generated maps of real size.

The maps lie in files, as extracted ones would; pairs are drawn among them as in one class of SPair-71k (some 680 pairs
among 27 images), and go through the shelf and the matching that `difftap bench pck` uses. Measured in a fresh child
process, so that the peak is the matching's own.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftap.coords import Geometry, Size
from difftap.errors import BackendError, DifftapError, InputError
from difftap.featuremap import FeatureMap
from difftap.features.shelf import Made, MapShelf, View
from difftap.machine import available_cores, cpu, peak_memory
from difftap.matching.joining import Joining, find
from difftap.recipe import Matcher

__all__ = ["SpeedCase", "SpeedResult", "format_speed", "run", "to_json"]

SCHEMA = "difftap.bench.dense-speed/1"
SPAIR_PAIRS = 12234
_WARM_UP = 3


@dataclass(frozen=True)
class SpeedCase:
    """What is matched.

    Attributes:
        pairs: number of pairs.
        images: number of images they are drawn from.
        keypoints: per pair.
        channels: of the maps.
        grid: side of the square maps, in cells.
        size: ``(W, H)`` of the images, in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        confidence: also margin and cycle error.
        memory: for maps, in MB; more lies in files.
    """

    pairs: int = 200
    images: int = 27
    keypoints: int = 7
    channels: int = 1280
    grid: int = 48
    size: Size = (500, 375)
    interpolation: str = "bilinear"
    confidence: bool = False
    memory: int = 512

    def __post_init__(self) -> None:
        for name in ("pairs", "keypoints", "channels", "grid", "memory"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: a whole number above 0")
        if self.images < 2 or min(self.size) < 1:
            raise InputError(f"{self.images} images of {self.size}; allowed: 2 or more, of at least 1 x 1 pixels")


@dataclass(frozen=True)
class SpeedResult:
    """What was measured, wall time and resident memory.

    Attributes:
        case: what was matched.
        seconds: for all pairs after the warm-up; reading maps, making targets ready and matching are inside.
        rate: pairs a second.
        slowest: seconds of the slowest pair.
        median: seconds of the median pair.
        peak: most resident bytes of the process.
        reads: maps read from files.
        conditions: machine, versions, what is inside.
    """

    case: SpeedCase
    seconds: float
    rate: float
    slowest: float
    median: float
    peak: int
    reads: int
    conditions: dict[str, Any]


def run(case: SpeedCase) -> SpeedResult:
    """Generate the maps and measure, in a child process.

    Raises:
        BackendError: the child failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "difftap.bench.densespeed", json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BackendError(f"the measuring process failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    data = json.loads(done.stdout)
    return SpeedResult(case=case, **data)


def _generate(case: SpeedCase, folder: Path) -> list[View]:
    """Random maps as files; neighbouring cells alike, as a network's are."""
    views = []
    for k in range(case.images):
        stream = np.random.default_rng([case.channels, k])
        data = stream.standard_normal((case.channels, case.grid, case.grid), np.float32)
        data[:, 1:] += 0.7 * data[:, :-1]
        data[:, :, 1:] += 0.7 * data[:, :, :-1]
        np.save(folder / f"{k}.npy", data)
        views.append(View(folder / f"{k}.npy"))
    return views


def measure(case: SpeedCase, folder: Path) -> dict[str, Any]:
    """Match the pairs in this process; what `SpeedResult` holds beside the case."""
    views = _generate(case, folder)
    stream = np.random.default_rng(1)
    chosen = [stream.choice(case.images, 2, replace=False) for _ in range(case.pairs + _WARM_UP)]
    points = stream.integers(0, np.array(case.size), (len(chosen), case.keypoints, 2)).astype(np.float64)
    order = [views[k] for pair in chosen for k in pair]
    geometry = Geometry.stretch(case.size, (16 * case.grid, 16 * case.grid))

    def make(wanted: Sequence[View]) -> Iterator[Made | DifftapError]:
        for view in wanted:
            yield Made((FeatureMap(np.load(view.path, allow_pickle=False), geometry),), case.size)

    joining = Joining(Matcher("dense", case.interpolation), (1.0,))
    scratch = folder / "scratch"
    scratch.mkdir()
    shelf = MapShelf(make, joining.ready, order, case.memory << 20, scratch)
    seconds = []
    for (first, second), xy in zip(chosen, points, strict=True):
        began = time.perf_counter()
        both = views[first], views[second]
        find(shelf.ready(both[0]), shelf.ready(both[1]), xy, case.size, case.confidence)
        shelf.done(*both)
        seconds.append(time.perf_counter() - began)
    timed = sorted(seconds[_WARM_UP:])
    return {
        "seconds": sum(timed),
        "rate": len(timed) / sum(timed),
        "slowest": timed[-1],
        "median": timed[len(timed) // 2],
        "peak": peak_memory(),
        "reads": shelf.made,
        "conditions": {
            "cpu": cpu(),
            "cores": available_cores(),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "warm_up": f"{_WARM_UP} pairs",
            "inside": "reading maps from files, making images ready, matching to whole pixels of the original image",
        },
    }


def to_json(result: SpeedResult) -> dict[str, Any]:
    """The result as plain data, with the schema's name and version first."""
    return {"schema": SCHEMA, **asdict(result)}


def format_speed(result: SpeedResult) -> list[str]:
    """Lines for a terminal."""
    case, at = result.case, result.conditions
    extra = ", with margin and cycle error" if case.confidence else ""
    minutes = SPAIR_PAIRS / result.rate / 60
    return [
        f"dense {case.interpolation}: maps {case.channels} x {case.grid} x {case.grid}, images {case.size[0]} x "
        f"{case.size[1]} at full resolution, {case.keypoints} keypoints a pair{extra}",
        f"{case.pairs} pairs among {case.images} images in {result.seconds:.2f} s: {result.rate:.1f} pairs/s, median "
        f"{1e3 * result.median:.1f} ms, slowest {1e3 * result.slowest:.1f} ms",
        f"peak memory {result.peak / 1e6:.0f} MB (maps held to {case.memory} MB), {result.reads} maps made ready",
        f"SPair-71k's {SPAIR_PAIRS} test pairs at that rate: {minutes:.1f} minutes",
        f"{at['cpu']}, {at['cores']} cores; numpy {at['versions']['numpy']}",
        f"warm-up: {at['warm_up']}; timed: {at['inside']}",
    ]


def _main() -> None:
    raw = json.loads(sys.argv[1])
    raw["size"] = tuple(raw["size"])
    with tempfile.TemporaryDirectory(prefix="difftap-") as folder:
        sys.stdout.write(json.dumps(measure(SpeedCase(**raw), Path(folder))))


if __name__ == "__main__":
    _main()
