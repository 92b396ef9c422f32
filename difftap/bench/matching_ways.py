"""The ways of dense matching that `difftap.bench.matching` compares, and the memory each takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.bench.host import hold_threads
from difftap.coords import Geometry, Size
from difftap.errors import BackendError, InputError, require
from difftap.featuremap import FeatureMap
from difftap.machine import peak_memory, resident_memory
from difftap.matching import match_points
from difftap.recipe import Matcher

__all__ = ["Case", "peak_growth", "peak_in_child", "require_torch", "slow_way"]


def require_torch() -> Any:
    """torch, or the pip line."""
    return require("torch", "bench", "comparing with the slow way")


@dataclass(frozen=True)
class Case:
    """What is matched.

    Attributes:
        channels: C of both maps.
        grid: side of the square maps, in cells.
        image: ``(W, H)`` of both images, in pixels.
        keypoints: number of whole source pixels to find.
        interpolation: ``bilinear`` (as DIFT) or ``bicubic``.
        threads: for BLAS and torch alike.
        seed: of the maps and keypoints.
    """

    channels: int = 1280
    grid: int = 48
    image: Size = (500, 375)
    keypoints: int = 10
    interpolation: str = "bilinear"
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", tuple(self.image))
        for name in ("channels", "grid", "keypoints", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: a whole number above 0")

    def inputs(self) -> tuple[FeatureMap, FeatureMap, NDArray[np.int64]]:
        """Random source and target maps ``(C, h, w)`` and whole points ``(N, 2)``."""
        rng = np.random.default_rng(self.seed)
        geometry = Geometry.stretch(image=self.image, input=(16 * self.grid, 16 * self.grid))
        shape = (self.channels, self.grid, self.grid)
        source, target = (FeatureMap(rng.standard_normal(shape, np.float32), geometry) for _ in range(2))
        return source, target, rng.integers(0, self.image, (self.keypoints, 2))


def slow_way(
    source: FeatureMap, target: FeatureMap, points: NDArray[np.int64], interpolation: str, once: bool
) -> tuple[NDArray[np.float64], float, float]:
    """The slow way in torch, float32: pixels ``(N, 2)``, seconds spent enlarging, seconds spent searching."""
    # Channels stay first: normalising the map transposed to (H W, C), as one also finds, is no faster.
    torch = require_torch()
    functional = torch.nn.functional
    start = time.perf_counter()
    maps = []
    for features in (source, target):
        width, height = features.image_size
        data = torch.from_numpy(features.data)[None]
        maps.append(functional.interpolate(data, size=(height, width), mode=interpolation, align_corners=False)[0])
    near, far = maps[0], maps[1].flatten(1)  # (C, H, W), (C, H W)
    enlarged = time.perf_counter()
    if once:
        far = functional.normalize(far, dim=0)
    width = target.image_size[0]
    found = np.empty((len(points), 2))
    for n, (x, y) in enumerate(points):
        vector = functional.normalize(near[:, y, x], dim=0)
        pixels = far if once else functional.normalize(far, dim=0)
        found[n] = divmod(int(torch.argmax(vector @ pixels)), width)[::-1]
    return found, enlarged - start, time.perf_counter() - enlarged


def peak_in_child(way: str, case: Case) -> int:
    """Peak growth in bytes of one way, run once in a fresh process."""
    code = (
        "import json, sys; from difftap.bench.matching_ways import Case, peak_growth; "
        "sys.stdout.write(str(peak_growth(sys.argv[1], Case(**json.loads(sys.argv[2])))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, way, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BackendError(f"measuring the memory of '{way}' failed: {reason}; it may need more memory than is free")
    return int(done.stdout)


def peak_growth(way: str, case: Case) -> int:
    """Peak resident memory of one call over what was resident before it, in bytes; for a fresh process."""
    source, target, points = case.inputs()
    slow = way in ("dift", "once")
    if slow:
        require_torch()  # loaded before the baseline is taken
    with hold_threads(case.threads):
        before = resident_memory()
        if slow:
            slow_way(source, target, points, case.interpolation, way == "once")
        else:
            match_points(source, target, points, Matcher("dense", case.interpolation), confidence=False)
        return max(0, peak_memory() - before)
