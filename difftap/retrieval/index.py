"""What every index is, wherever it lies, and how one is opened: a folder with a FAISS index, or a Milvus collection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import ArtefactError, InputError
from difftap.retrieval.origin import Origin
from difftap.retrieval.rows import Rows
from difftap.retrieval.spaces import Space

__all__ = ["About", "Batch", "Index", "is_milvus"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some vectors, float32 ``(B, D)``, not prepared, and what is known of them."""

    vectors: NDArray[np.float32]
    rows: Rows


@dataclass(frozen=True)
class About:
    """What an index says of itself.

    Attributes:
        origin: of its vectors.
        metric: of its space.
        kind: flat, ivf, ivf-pq or hnsw.
        width: D.
        count: number of rows.
        report: how it was made and what was measured then: parameters, recall against exact, versions.
    """

    origin: Origin
    metric: str
    kind: str
    width: int
    count: int
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """The metric's space."""
        return Space(self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return {**asdict(self), "report": dict(self.report)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> About:
        """Read what `to_dict` gave.

        Raises:
            ArtefactError: it is none.
        """
        try:
            origin = Origin.from_dict(data["origin"])
            numbers = int(data["width"]), int(data["count"])
            return cls(origin, Space(data["metric"]).metric, str(data["kind"]), *numbers, dict(data["report"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"index '{where}' does not say what it is ({error}); build it again") from error


class Index(ABC):
    """An index that is open.

    Attributes:
        where: the folder or address, as the user gave it.
        about: what it is; changes with `add`.
    """

    where: str
    about: About

    @abstractmethod
    def find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Raw scores and rows ``(Q, k)`` of prepared queries ``(Q, D)``, nearest first; row -1 where there is none."""

    @abstractmethod
    def rows(self) -> Rows:
        """What is known of every row."""

    @abstractmethod
    def facts(self, rows: NDArray[np.int64]) -> Rows:
        """What is known of some rows, in the order given."""

    @abstractmethod
    def add(self, batches: Iterable[Batch]) -> int:
        """Add vectors, all or none; returns how many."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open."""

    def search(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores (`About.space` says their direction) and rows ``(Q, k)``, nearest first.

        ``k`` beyond the number of rows is cut to it; a row of -1 and a score of NaN stand where fewer were found.

        Raises:
            InputError: the vectors do not fit, or k is below 1.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.about.width:
            raise InputError(f"queries have the shape {vectors.shape}; allowed: (Q, {self.about.width}), the index's")
        if k < 1:
            raise InputError(f"k is {k}; allowed: 1 or more")
        raw, rows = self.find(self.about.space.prepare(vectors), min(k, self.about.count))
        return np.where(rows >= 0, self.about.space.score(raw), np.nan), rows

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_milvus(where: str) -> bool:
    """Whether an address is Milvus': ``http://host:port``, or a milvus-lite file that ends in ``.db``."""
    return where.startswith(("http://", "https://", "tcp://")) or where.endswith(".db")
