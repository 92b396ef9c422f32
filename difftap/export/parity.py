"""Fidelity: how far a backend's outputs are from those of the float32 reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.engine.backend import Array, Graph, Profile
from difftap.engine.noise import example_feeds
from difftap.engine.registry import get_backend

__all__ = ["TensorParity", "measure"]


@dataclass(frozen=True)
class TensorParity:
    """The differences between an output and its reference.

    Attributes:
        max_abs: largest absolute difference.
        relative: L2 norm of the difference divided by L2 norm of the reference.
        relative_max: largest absolute difference divided by the reference's largest absolute value.
        cosine_mean: mean over cells of the cosine between the two feature vectors.
        cosine_min: smallest of these cosines.
    """

    max_abs: float
    relative: float
    relative_max: float
    cosine_mean: float
    cosine_min: float

    @classmethod
    def of(cls, value: NDArray[np.floating], reference: NDArray[np.floating]) -> TensorParity:
        """Compare ``(B, C, h, w)`` arrays; cosines are over C."""
        a, b = value.astype(np.float64), reference.astype(np.float64)
        gap = np.abs(a - b)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # (B, h, w)
        cosine = (a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)  # of a zero vector 0, not NaN
        return cls(
            float(gap.max()),
            _share(float(np.linalg.norm(gap)), float(np.linalg.norm(b))),
            _share(float(gap.max()), float(np.abs(b).max())),
            float(cosine.mean()),
            float(cosine.min()),
        )

    @classmethod
    def worst(cls, parts: Sequence[TensorParity]) -> TensorParity:
        """Take the worst of each figure over several images."""
        errors = (max(getattr(one, name) for one in parts) for name in ("max_abs", "relative", "relative_max"))
        return cls(*errors, *(min(getattr(one, name) for one in parts) for name in ("cosine_mean", "cosine_min")))

    @property
    def summary(self) -> str:
        """The figures on one line, for a terminal."""
        return (
            f"relative {self.relative:.1e}   max abs {self.max_abs:.1e}   max/peak {self.relative_max:.1e}   "
            f"cosine mean {self.cosine_mean:.8f} min {self.cosine_min:.8f}"
        )

    def to_dict(self) -> dict[str, float]:
        """Give plain data for a manifest."""
        return asdict(self)


def _share(error: float, whole: float) -> float:
    """Divide an error by the whole; infinite if the whole is 0 and the error is not."""
    if whole == 0:
        return math.inf if error else 0.0
    return error / whole


def measure(
    graph: Graph,
    profile: Profile,
    backend: str,
    device: str,
    threads: int | None,
    built: Path | None = None,
    *,
    feeds: Mapping[str, Array] | None = None,
    against: tuple[str, Graph] | None = None,
) -> dict[str, TensorParity]:
    """Measure the parity of every output of a graph: run it on a backend and on the float32 reference.

    Args:
        graph: what is measured.
        profile: shapes and precision of the measured engine; the reference has the same shapes in fp32.
        backend: name of the measured backend.
        device: one of the backend's; the reference runs on the CPU.
        threads: CPU threads of both; None for their own choice.
        built: folder of the engine's files, if it has any.
        feeds: inputs of both, of any number of images, of which the worst figures count; None for
            `difftap.engine.noise.example_feeds`.
        against: the reference's backend and graph; None for torch.
    """
    whole = example_feeds(graph, profile) if feeds is None else feeds
    count = len(next(iter(whole.values())))
    parts = [
        {name: value[start : start + profile.batch] for name, value in whole.items()}
        for start in range(0, count, profile.batch)
    ]
    # One after the other, so that only one of the networks is in memory.
    name, exact = against or ("torch", graph)
    with get_backend(name).open(exact, replace(profile, precision="fp32"), "cpu", threads) as reference:
        wanted = [reference.run(part) for part in parts]
    with get_backend(backend).open(graph, profile, device, threads, built) as engine:
        got = [engine.run(part) for part in parts]
    return {
        output: TensorParity.worst([TensorParity.of(a[output], b[output]) for a, b in zip(got, wanted, strict=True)])
        for output in wanted[0]
    }
