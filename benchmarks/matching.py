"""Dense matching beside DIFT's way in torch, which enlarges both maps to image size: time, memory, floor, same pixels.

python benchmarks/matching.py [--channels 1280] [--grid 48] [--keypoints 10] [--repeats 3]

The floor is the time of the arithmetic that the method cannot avoid, at the rate of a matrix product on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from timing import conditions, count, measure, peak, product_rate, table

from difftap.bench.rivals import slow_way
from difftap.coords import Geometry
from difftap.featuremap import FeatureMap
from difftap.matching import match_points
from difftap.recipe import Matcher

WAYS = {"slow, as DIFT's evaluation": "dift", "slow, normalised once": "once", "difftap": "difftap"}


def make(
    way: str, channels: int, grid: int, image: list[int], keypoints: int, interpolation: str
) -> Callable[[], object]:
    """Make seeded maps (C, h, w) and points (N, 2), and give the call that finds them, as pixels (N, 2)."""
    rng = np.random.default_rng(0)
    size = (image[0], image[1])
    geometry = Geometry.stretch(image=size, input=(16 * grid, 16 * grid))
    source, target = (FeatureMap(rng.standard_normal((channels, grid, grid), np.float32), geometry) for _ in range(2))
    points = rng.integers(0, size, (keypoints, 2))
    if way == "difftap":
        matcher = Matcher("dense", interpolation)
        return lambda: match_points(source, target, points, matcher, confidence=False).target
    import torch  # noqa: F401 - before memory is looked at, not in the call that is measured

    return lambda: slow_way(source, target, points, interpolation, way == "once")


def floor_flops(channels: int, grid: int, image: Sequence[int], keypoints: int, interpolation: str) -> int:
    """Count the operations that no way of doing without enlarged maps can leave out; a multiply-add is two.

    Every keypoint's descriptor meets every cell of the target once; the norms between cells need the products of each
    cell with its neighbours (itself and half of those around it, since the products are the same from both sides); and
    each keypoint's scores, and the norms once, are enlarged to the image, along x and then along y.
    """
    width, height = image
    taps = {"bilinear": 2, "bicubic": 4}[interpolation]
    neighbours = {"bilinear": 5, "bicubic": 25}[interpolation]
    products = (keypoints + neighbours) * channels * grid**2
    enlarging = (keypoints + 1) * taps * width * (grid + height)
    return 2 * (products + enlarging)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("channels", 1280), ("grid", 48), ("keypoints", 10), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=count, default=value)
    parser.add_argument("--image", type=count, nargs=2, default=[500, 375], metavar=("W", "H"))
    parser.add_argument("--interpolation", choices=["bilinear", "bicubic"], default="bilinear")
    case = vars(parser.parse_args(arguments))
    repeats, threads = case.pop("repeats"), case.pop("threads")
    ways = {label: make(way, **case) for label, way in WAYS.items()}
    times = measure(ways, repeats, threads)
    peaks = {label: peak("matching:make", threads, way=way, **case) for label, way in WAYS.items()}
    flops, rate = floor_flops(**case), product_rate(threads)
    floor = f"floor: {flops / 1e6:.1f} MFLOP at {rate / 1e9:.1f} GFLOP/s", flops / rate
    print("\n".join(table(f"dense matching: {case}", times, "difftap", peaks, floor).text()))
    found = [np.asarray(way()) for way in ways.values()]
    print(f"same pixel for {int((found[0] == found[2]).all(axis=1).sum())} of {len(found[0])} keypoints")
    print(conditions(threads, "torch"))


if __name__ == "__main__":
    main()
