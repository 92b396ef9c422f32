"""The kinds of FAISS index: which one to take for how many vectors, and how each is made, trained and tuned.

=======  ===========================================================  ==============================
kind     what a search reads                                          bytes of memory per vector
=======  ===========================================================  ==============================
flat     every vector; exact                                          4 D
ivf      the vectors of the nearest lists                             4 D
ivf-pq   codes of the vectors of the nearest lists; then, with        D / 8 (and D with ``refine``)
         ``refine``, the best ones' 8-bit vectors
hnsw     a graph of neighbours                                        4 D + 256
=======  ===========================================================  ==============================

Axis letters: N vectors; D dimensions; Q queries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from difftap.errors import BackendError, InputError, first_line, require

__all__ = [
    "INDEXED",
    "KINDS",
    "FaissIndex",
    "IndexMetric",
    "IndexPlan",
    "choose_kind",
    "code_bytes",
    "efforts",
    "faiss_clash",
    "list_count",
    "load_faiss",
    "make",
    "set_effort",
    "steps",
    "to_gpu",
    "tune",
]


INDEXED = ("correlation", "cosine", "euclidean", "manhattan")
"""The metrics that an index can rank by."""


class FaissIndex(Protocol):
    """The part of ``faiss.Index`` that is used here; N vectors, D dimensions, Q queries, k hits."""

    d: int
    ntotal: int

    def train(self, x: NDArray[np.float32]) -> None: ...  # noqa: D102
    def add(self, x: NDArray[np.float32]) -> None: ...  # noqa: D102
    def search(self, x: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return raw scores and row numbers, ``(Q, k)`` each; -1 where there are fewer rows."""


@dataclass(frozen=True)
class IndexMetric:
    """How an index realises a metric: how vectors are prepared, and what a score means.

    The inner product of two prepared vectors is their cosine (``cosine``: scaled to length 1) or Pearson's correlation
    (``correlation``: centred, then scaled). So an index of inner products ranks exactly like
    `difftap.retrieval.distances`. A vector without direction becomes zeros, and its similarity to everything is 0.
    ``dcor`` is refused: its prepared vectors would have D (D + 1) / 2 numbers. ``manhattan`` works in flat indexes
    only.

    Attributes:
        metric: one of `INDEXED`.

    Raises:
        InputError: another metric.
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
        """Whether a higher score is nearer (a similarity) or a lower one (a distance)."""
        return self.product == "ip"

    @property
    def meaning(self) -> str:
        """The score in words, with its direction."""
        words = {"cosine": "cosine", "correlation": "Pearson's correlation"}.get(self.metric, f"{self.metric} distance")
        return f"{words}; {'higher' if self.higher_is_nearer else 'lower'} is nearer"

    def prepare(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Prepare vectors ``(N, D)`` as the index stores and compares them.

        Raises:
            InputError: they are not finite, or are no array ``(N, D)`` of floating-point numbers.
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
            part[flat] = 0.0  # by rounding, the mean of equal numbers may differ from them
        # Divide by the largest number first, because the squares of tiny numbers would be 0.
        largest = np.abs(part).max(axis=1, keepdims=True, initial=0.0)
        part = np.divide(part, largest, out=np.zeros_like(part), where=largest > 0)
        length = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))[:, None].astype(part.dtype)
        part = np.divide(part, length, out=part, where=length > 0)
        return np.ascontiguousarray(part, np.float32)

    def score(self, raw: NDArray[np.float32]) -> NDArray[np.float64]:
        """Turn raw scores of the index into a similarity from -1 to 1, or a distance."""
        values = raw.astype(np.float64)
        if self.product == "ip":
            return np.clip(values, -1.0, 1.0)  # rounding may exceed 1
        # FAISS gives squared lengths for l2, which rounding may make negative.
        return np.asarray(np.sqrt(np.maximum(values, 0.0)) if self.product == "l2" else values)


_FAISS = re.compile(r"faiss-(cpu|gpu(-.*)?)$")


def faiss_clash(names: Iterable[str] | None = None) -> str | None:
    """Describe a clash of installed FAISS distributions; None if there is none.

    milvus-lite depends on faiss-cpu, so installing the extra ``milvus`` beside a GPU build overwrites that build's
    files.

    Args:
        names: names of the installed distributions; by default those of this environment.

    >>> faiss_clash(["numpy", "faiss-cpu"]) is None
    True
    """
    if names is None:
        names = [str(one.metadata["Name"]) for one in metadata.distributions()]
    flat = (name.lower().replace("_", "-") for name in names if name)
    found = sorted({name for name in flat if _FAISS.match(name)})
    if len(found) < 2:
        return None
    gpu = next((name for name in found if "gpu" in name), found[-1])
    others = [name for name in found if name != gpu]
    return (
        f"{' and '.join(found)} are installed together and overwrite each other's module 'faiss'; keep one: pip "
        f"uninstall {' '.join(found)}, then pip install {gpu} (or {others[0]}); milvus-lite needs faiss-cpu, so use it "
        "in another environment than a GPU build"
    )


KINDS = ("flat", "ivf", "ivf-pq", "hnsw")

FLAT_BYTES = 256 << 20
"""Up to so many bytes of vectors, a flat index is chosen: a query then takes a few hundredths of a second."""

IVF_BYTES = 2 << 30
"""Up to so many bytes of vectors, an index of whole vectors is chosen; above it, one of codes, to save memory."""

_SAMPLE_PER_LIST = 64  # training vectors per centroid of a list
_SAMPLE_LEAST = 256 * 64  # as many per centroid of a code, of which there are 256
_LINKS = 32  # neighbours of a vector in the graph of hnsw
_FURTHEST = 1024  # candidates that a search of a graph may keep at most


@dataclass(frozen=True)
class IndexPlan:
    """How an index is made.

    Attributes:
        kind: one of `KINDS`.
        space: the metric.
        lists: number of lists (ivf, ivf-pq); by default about the square root of N.
        codes: bytes of a vector's code (ivf-pq); a divisor of D, by default the largest up to D / 8.
        refine: keep 8-bit vectors too, and rank the best candidates by them (ivf-pq).
        recall: the recall@10 to reach (ivf, ivf-pq, hnsw); the search effort is set so that it does, if it can.
        seed: seed of the training sample and of the held-out queries.
        gpu: train and search on the GPU.

    Raises:
        InputError: values that are not allowed, or not together.
    """

    kind: str
    space: IndexMetric
    lists: int | None = None
    codes: int | None = None
    refine: bool = False
    recall: float = 0.95
    seed: int = 0
    gpu: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is '{self.kind}'; allowed: {', '.join(KINDS)}")
        if self.space.product == "l1" and self.kind != "flat":
            raise InputError(f"metric is 'manhattan', kind '{self.kind}'; allowed with manhattan: flat")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall is {self.recall}; allowed: a fraction above 0, up to 1")
        if self.lists is not None and (self.lists < 1 or not self.kind.startswith("ivf")):
            raise InputError(f"lists is {self.lists}, kind '{self.kind}'; allowed: 1 or more, with ivf and ivf-pq")
        if (self.codes is not None or self.refine) and self.kind != "ivf-pq":
            raise InputError(f"--codes and --refine go with ivf-pq, and the kind is '{self.kind}'")
        if self.gpu and (self.kind == "hnsw" or self.refine):
            raise InputError("on a GPU, allowed are flat, ivf, and ivf-pq without --refine; leave --gpu out")


def choose_kind(count: int, width: int, space: IndexMetric) -> str:
    """Choose the kind for N vectors of D dimensions: exact if that is fast, codes if the vectors would fill memory."""
    size = 4 * count * width
    if size <= FLAT_BYTES or space.product == "l1":
        return "flat"
    return "ivf" if size <= IVF_BYTES else "ivf-pq"


def load_faiss(why: str) -> ModuleType:
    """Import FAISS from the distribution that is installed; ``why`` is the subject of the error's sentence.

    Raises:
        MissingExtraError: none is installed; the message holds the pip line.
    """
    return require("faiss", "index", why)


def _product(faiss: ModuleType, space: IndexMetric) -> int:
    return int({"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2, "l1": faiss.METRIC_L1}[space.product])


def sample_size(plan: IndexPlan, count: int) -> int:
    """Give the number of vectors that the training reads; 0 if nothing is trained."""
    if plan.kind in ("flat", "hnsw"):
        return 0
    least = _SAMPLE_LEAST if plan.kind == "ivf-pq" else 0
    return min(count, max(least, _SAMPLE_PER_LIST * list_count(plan, count)))


def list_count(plan: IndexPlan, count: int) -> int:
    """Give the number of lists (ivf, ivf-pq): the plan's, or the power of 2 nearest to the square root of N."""
    return plan.lists or max(1, 2 ** round(math.log2(max(1.0, math.sqrt(count)))))


def code_bytes(plan: IndexPlan, width: int) -> int:
    """Give the bytes of a vector's code: the plan's, or the largest divisor of the width up to an eighth of it.

    Raises:
        InputError: the plan's number does not divide the width.
    """
    if plan.codes is not None:
        if plan.codes < 1 or width % plan.codes:
            raise InputError(f"codes is {plan.codes}; allowed: a divisor of the width {width}")
        return plan.codes
    return max(d for d in range(1, max(1, width // 8) + 1) if width % d == 0)


def make(plan: IndexPlan, count: int, width: int, sample: Callable[[int], NDArray[np.float32]]) -> FaissIndex:
    """Make an empty FAISS index and train it.

    Args:
        plan: how to make it.
        count: number of vectors that will be added.
        width: D.
        sample: gives as many prepared vectors ``(n, D)`` as asked, to train on.

    Raises:
        InputError: there are too few vectors, or the codes do not divide the width.
        BackendError: FAISS refuses, or there is no GPU.
    """
    faiss = load_faiss("an index")
    product = _product(faiss, plan.space)
    empty: FaissIndex
    if plan.kind == "flat":
        empty = faiss.IndexFlat(width, product)
        return empty
    if plan.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, _LINKS, product)
        graph.hnsw.efConstruction = 100
        empty = graph
        return empty
    lists, wanted = list_count(plan, count), sample_size(plan, count)
    vectors = sample(wanted)
    if len(vectors) < lists:
        raise InputError(f"{len(vectors)} vectors cannot make {lists} lists; use fewer, or kind flat")
    quantizer = faiss.IndexFlat(width, product)
    if plan.kind == "ivf":
        index = faiss.IndexIVFFlat(quantizer, width, lists, product)
    else:
        if len(vectors) < 256:
            raise InputError(f"{len(vectors)} vectors cannot train ivf-pq, which takes 256 or more; use kind flat")
        index = faiss.IndexIVFPQ(quantizer, width, lists, code_bytes(plan, width), 8, product)
        index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.seed = 1 + plan.seed
    # The index, not Python, must free the quantizer, which would otherwise be freed at the end of this function.
    index.own_fields = True
    quantizer.this.disown()
    index.cp.min_points_per_centroid = 1  # else FAISS prints warnings to stderr
    index.cp.seed = 1 + plan.seed
    if plan.refine:
        exact = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, product)
        whole = faiss.IndexRefine(index, exact)
        whole.own_fields = whole.own_refine_index = True
        index.this.disown()
        exact.this.disown()
        whole.k_factor = 8.0  # candidates per hit that are ranked again
        index = whole
    try:
        if not plan.gpu:
            index.train(vectors)
            empty = index
        else:
            moved = to_gpu(index)
            moved.train(vectors)
            empty = faiss.index_gpu_to_cpu(moved)
        return empty
    except RuntimeError as error:
        raise BackendError(f"FAISS cannot train this index: {first_line(error)}") from error


def to_gpu(index: FaissIndex) -> FaissIndex:
    """Copy an index to the first GPU.

    Raises:
        BackendError: this FAISS has no GPU support, sees no GPU, or cannot hold this index there.
    """
    faiss = load_faiss("an index on a GPU")
    if not hasattr(faiss, "StandardGpuResources"):
        raise BackendError("this FAISS was built without GPU support; install faiss-gpu-cu12 in place of faiss-cpu")
    if faiss.get_num_gpus() < 1:
        raise BackendError("FAISS sees no GPU here; leave --gpu out")
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # in float32, the lookup tables of long codes exceed the GPU's shared memory
    try:
        copied: FaissIndex = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)
        return copied
    except RuntimeError as error:
        raise BackendError(
            f"FAISS cannot hold this index on the GPU ({first_line(error)}); with ivf-pq, it allows --codes 1, 2, 3, "
            "4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96"
        ) from error


def efforts(index: FaissIndex) -> Iterator[int]:
    """Yield search efforts from small to large: lists to read, or candidates to keep; none for a flat index."""
    faiss = load_faiss("an index")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        return steps("ivf", int(ivf.nlist))
    return steps("hnsw" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else "flat", None)


def steps(kind: str, lists: int | None) -> Iterator[int]:
    """Yield the efforts to try for a kind of index: doubling up to all lists, or to half of them if they are many."""
    if kind == "flat":
        return
    effort, most = (16, _FURTHEST) if lists is None else (1, lists if lists <= 256 else lists // 2)
    while effort < most:
        yield effort
        effort *= 2
    yield most


def set_effort(index: FaissIndex, effort: int | None) -> None:
    """Set the search effort, one of `efforts`; None changes nothing, for a flat index."""
    if effort is None:
        return
    faiss = load_faiss("an index")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = effort
    else:
        faiss.downcast_index(index).hnsw.efSearch = effort


def tune(
    steps: Iterable[int], use: Callable[[int], None], measure: Callable[[], float], target: float
) -> tuple[int | None, float]:
    """Find the least effort that reaches a recall, and leave it set.

    Args:
        steps: the efforts, from small to large.
        use: sets an effort.
        measure: measures the recall at the effort that is set.
        target: the recall to reach.

    Returns:
        the effort and its recall. If no effort reaches the target, the least effort whose recall is within 0.005 of the
        best. The effort is None if there are no steps.
    """
    found: list[tuple[int, float]] = []
    for effort in steps:
        use(effort)
        found.append((effort, measure()))
        if found[-1][1] >= target:
            return found[-1]
    if not found:
        return None, measure()
    best = max(recall for _, recall in found)
    effort, recall = next(one for one in found if one[1] >= best - 0.005)
    use(effort)
    return effort, recall
