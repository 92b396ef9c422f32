"""Metrics as an index knows them: what is done to a vector before it is stored or sought, and what a score then means.

Inner products of what `Space.prepare` returns are cosines (``cosine``: scaled to length 1) or Pearson's correlations
(``correlation``: centred, then scaled), so an index of inner products ranks exactly as
`difftap.retrieval.distances` does. A
vector without direction becomes zeros: its similarity to everything is 0. ``dcor`` has no such vectors of a size that
could be stored (there are D (D + 1) / 2 of them) and is refused; ``manhattan`` is known to flat indexes alone.

Axis letters: N vectors; D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError

__all__ = ["INDEXED", "Space"]

INDEXED = ("correlation", "cosine", "euclidean", "manhattan")


@dataclass(frozen=True)
class Space:
    """A metric that can be indexed.

    Attributes:
        metric: one of `INDEXED`.
    """

    metric: str = "correlation"

    def __post_init__(self) -> None:
        if self.metric == "dcor":
            raise InputError(
                "metric is 'dcor', which no index can hold: it is no product of short vectors; allowed: "
                f"{', '.join(INDEXED)}; for all pairs of a table, difftap.retrieval.distances has it"
            )
        if self.metric not in INDEXED:
            raise InputError(f"metric is '{self.metric}'; allowed: {', '.join(INDEXED)}")

    @property
    def product(self) -> str:
        """What the index computes: ``ip`` (inner product), ``l2`` or ``l1``."""
        return {"euclidean": "l2", "manhattan": "l1"}.get(self.metric, "ip")

    @property
    def higher_is_nearer(self) -> bool:
        """Direction of the score: a similarity rises with nearness, a distance falls."""
        return self.product == "ip"

    @property
    def meaning(self) -> str:
        """The score in words, with its direction."""
        words = {"cosine": "cosine", "correlation": "Pearson's correlation"}.get(self.metric, f"{self.metric} distance")
        return f"{words}; {'higher' if self.higher_is_nearer else 'lower'} is nearer"

    def prepare(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors ``(N, D)`` as the index stores them, float32.

        Raises:
            InputError: they are not finite, or no such array.
        """
        part = np.asarray(vectors)
        if part.ndim != 2 or not np.issubdtype(part.dtype, np.floating):
            raise InputError(f"vectors are {part.dtype} {part.shape}; allowed: floating point, (N, D)")
        if not np.isfinite(part).all():
            bad = int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
            raise InputError(f"vector {bad} holds NaN or infinity; vectors must be finite, so make them again")
        if self.product != "ip":
            return np.ascontiguousarray(part, np.float32)
        part = part.astype(np.float64 if part.dtype == np.float64 else np.float32)
        if self.metric == "correlation":
            flat = np.ptp(part, axis=1) == 0
            part = part - part.mean(axis=1, keepdims=True, dtype=np.float64).astype(part.dtype)
            part[flat] = 0.0  # the mean of equal numbers need not be that number
        largest = np.abs(part).max(axis=1, keepdims=True, initial=0.0)
        part = np.divide(part, largest, out=np.zeros_like(part), where=largest > 0)  # squares of tiny ones would vanish
        length = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))[:, None].astype(part.dtype)
        part = np.divide(part, length, out=part, where=length > 0)
        return np.ascontiguousarray(part, np.float32)

    def score(self, raw: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the index returned, as a score: a similarity of -1 to 1, or a distance."""
        values = raw.astype(np.float64)
        if self.product == "ip":
            return np.clip(values, -1.0, 1.0)
        return np.asarray(np.sqrt(np.maximum(values, 0.0)) if self.product == "l2" else values)
