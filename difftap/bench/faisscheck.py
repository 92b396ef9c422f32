"""Whether FAISS finds the same neighbours as plain numpy, on the GPU where its build has one; in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["FaissCheck", "check_faiss"]

_POINTS, _QUERIES, _WIDTH, _NEAREST = 20_000, 200, 256, 5


@dataclass(frozen=True)
class FaissCheck:
    """What came of it.

    Attributes:
        reason: why it was not run; None if it was.
        sound: whether every neighbour was as near as numpy's; None if it was not run.
        seconds: of the search of 200 queries among 20,000 points of 256 values.
        device: where it ran.
    """

    reason: str | None = None
    sound: bool | None = None
    seconds: float | None = None
    device: str = "cpu"

    @property
    def line(self) -> str:
        """For a terminal."""
        if self.reason is not None or self.seconds is None:
            return f"not run: faiss: {self.reason}"
        verdict = "same neighbours as numpy" if self.sound else "OTHER NEIGHBOURS than numpy"
        return f"faiss on {self.device}: {1e3 * self.seconds:.1f} ms for {_QUERIES} queries of {_POINTS}; {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_faiss(device: str, limit: float) -> FaissCheck:
    """Search in a child process, which a broken CUDA build may take down."""
    command = [sys.executable, "-m", "difftap.bench.faisscheck", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return FaissCheck(f"it took longer than {limit:g} seconds and was ended", device=device)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        return FaissCheck(f"its process ended: {said[:200]}", device=device)
    return FaissCheck(**json.loads(lines[-1]))


def _search(device: str) -> FaissCheck:
    try:
        import faiss
    except ImportError as error:
        return FaissCheck(f"not installed ({error})", device=device)
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if device == "cuda" and (not gpus or not hasattr(faiss, "StandardGpuResources")):
        return FaissCheck("installed without GPU support, or it sees no GPU", device=device)
    rng = np.random.default_rng(0)
    points, queries = (rng.standard_normal((count, _WIDTH)).astype(np.float32) for count in (_POINTS, _QUERIES))
    index: Any = faiss.IndexFlatIP(_WIDTH)
    if device == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(points)
    index.search(queries, _NEAREST)  # the first call sets things up
    began = time.perf_counter()
    _, found = index.search(queries, _NEAREST)
    seconds = time.perf_counter() - began
    products = queries.astype(np.float64) @ points.astype(np.float64).T
    best = -np.sort(-products, axis=1)[:, :_NEAREST]
    # Neighbours may be swapped where they are equally near to rounding, so distances are compared.
    sound = bool(np.allclose(np.take_along_axis(products, found, axis=1), best, rtol=1e-3, atol=1e-2))
    return FaissCheck(None, sound, seconds, device)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_search(sys.argv[1]).to_dict()) + "\n")
