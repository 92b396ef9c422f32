"""Distances of all pairs beside scipy's cdist, or the dcor package for distance correlation.

    python benchmarks/distances.py [--metric dcor] [--vectors 500] [--width 1280] [--pairs 2000] [--repeats 3]

dcor takes pair after pair and would take minutes for all; a sample is timed, and ours beside it for all pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from timing import conditions, count, measure, table

from difftap.errors import require
from difftap.retrieval.distances import METRICS, pairwise

SCIPY = {"euclidean": "euclidean", "manhattan": "cityblock", "cosine": "cosine", "correlation": "correlation"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vectors", 500), ("width", 1280), ("pairs", 2000), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=count, default=value)
    parser.add_argument("--metric", choices=list(METRICS), default="dcor")
    parser.add_argument("--device", default="cpu", help="of ours; the others know the CPU alone")
    case = parser.parse_args(arguments)
    drawn = np.random.default_rng(0).standard_normal((case.vectors, case.width)) + np.linspace(-1, 1, case.width)
    x = drawn.astype(np.float32)  # (N, D)
    double = x.astype(np.float64)
    at = np.array(np.triu_indices(case.vectors, 1))
    if case.metric == "dcor":
        dcor = require("dcor", "bench", "the comparison with the dcor package")
        at = at[:, np.random.default_rng(1).permutation(at.shape[1])[: case.pairs]]

        def other() -> np.ndarray:
            return np.asarray(1.0 - dcor.rowwise(dcor.distance_correlation, double[at[0]], double[at[1]]))
    else:
        spatial = require("scipy.spatial.distance", "bench", "the comparison with scipy")

        def other() -> np.ndarray:
            return np.asarray(spatial.cdist(double, double, SCIPY[case.metric])[at[0], at[1]])

    name = f"{'dcor' if case.metric == 'dcor' else 'scipy'}, {at.shape[1]} pairs"
    every = case.vectors * (case.vectors - 1) // 2
    ours = f"difftap, {every} pairs"
    ways = {ours: lambda: pairwise(x, metric=case.metric, device=case.device), name: other}
    times = measure(ways, case.repeats, case.threads)
    print("\n".join(table(f"{case.metric}, {case.vectors} vectors of {case.width}", times, ours).text()))
    scaled = times[name].median * every / at.shape[1]
    gap = float(np.abs(other() - pairwise(x, metric=case.metric, device=case.device)[at[0], at[1]]).max())
    print(f"scaled to all pairs: {scaled / times[ours].median:.1f} times ours; largest difference {gap:.1e}")
    print(conditions(case.threads, "scipy", "dcor"))


if __name__ == "__main__":
    main()
