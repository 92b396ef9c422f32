"""Build a FAISS index from a stream of vectors: write them to a file once, then train, fill and measure from there.

The file lets the kind of index be chosen by the number of vectors, and lets them exceed the memory.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, output_errors
from difftap.errors import InputError, require
from difftap.retrieval.faiss_folder import FolderIndex, check_new, held_folder, write_index
from difftap.retrieval.index import IndexInfo, Rows, VectorBatch, VectorOrigin
from difftap.retrieval.kinds import (
    FaissIndex,
    IndexMetric,
    IndexPlan,
    choose_kind,
    efforts,
    load_faiss,
    make,
    set_effort,
    to_gpu,
    tune,
)
from difftap.retrieval.quality import NearestSoFar, prepared_blocks, recall, without_self

__all__ = ["BuiltIndex", "IndexOptions", "build_folder", "fill", "held_out", "plan_for", "spool"]

NEIGHBOURS = 10  # recall is measured at so many
_HELD_OUT = 256  # query vectors to measure recall with


@dataclass(frozen=True)
class IndexOptions:
    """What a user may choose of an index; see `IndexPlan`. With ``kind`` = ``auto``, the size decides.

    Raises:
        InputError: options exclude each other.
    """

    kind: str = "auto"
    metric: str = "correlation"
    lists: int | None = None
    codes: int | None = None
    refine: bool = False
    recall: float = 0.95
    seed: int = 0
    gpu: bool = False

    def __post_init__(self) -> None:
        plan_for(self, 1000, 8)  # any size: it refuses impossible options before anything slow starts

    def to_dict(self) -> JsonObject:
        """Give plain data."""
        return asdict(self)


def plan_for(options: IndexOptions, count: int, width: int) -> IndexPlan:
    """Plan an index of N vectors of D dimensions.

    Raises:
        InputError: options exclude each other.
    """
    given = options.to_dict()
    space = IndexMetric(given.pop("metric"))
    kind = given.pop("kind")
    if kind == "auto":
        if options.lists is not None or options.codes is not None or options.refine:
            raise InputError("--lists, --codes and --refine shape an index of a given kind; give --kind too")
        kind = choose_kind(count, width, space)
        # One more byte per number restores the recall that the codes lose. FAISS has no such index on a GPU.
        given["refine"] = kind == "ivf-pq" and not options.gpu
    return IndexPlan(kind, space, **given)


@dataclass(frozen=True)
class BuiltIndex:
    """A FAISS index with all its vectors.

    Attributes:
        index: the FAISS index, on the CPU.
        plan: how it was made.
        effort: lists read or candidates kept in a search; None for a flat index.
        recall: recall@10 against exact search, of queries that the training did not see, without the query itself;
            1 for a flat index, which is exact.
        queries: number of these queries.
        sampled: number of vectors that the training saw.
        seconds: seconds of each step: ``train``, ``add`` and ``measure`` (exact search and choice of the effort).
    """

    index: FaissIndex
    plan: IndexPlan
    effort: int | None
    recall: float
    queries: int
    sampled: int
    seconds: dict[str, float]

    def report(self) -> JsonObject:
        """Give the parameters and measurements that are stored with the index."""
        faiss = load_faiss("an index")
        ivf = faiss.try_extract_index_ivf(self.index)
        parameters = {
            "lists": None if ivf is None else int(ivf.nlist),
            "codes": int(ivf.code_size) if self.plan.kind == "ivf-pq" else None,
            "refine": self.plan.refine,
            "seed": self.plan.seed,
            "recall": self.plan.recall,
        }
        measured = {
            "at": NEIGHBOURS,
            "value": self.recall,
            "queries": self.queries,
            "rows": int(self.index.ntotal),
            "how": "exact" if self.effort is None else "held-out queries against exact search",
        }
        return {
            "parameters": parameters,
            "effort": self.effort,
            "recall": measured,
            "sampled": self.sampled,
            "faiss": faiss.__version__,
        }


def fill(vectors: NDArray[np.floating], plan: IndexPlan) -> BuiltIndex:
    """Train an index, fill it in blocks, and set the least search effort that reaches the wanted recall.

    Args:
        vectors: ``(N, D)``, N at least 1; may be memory-mapped.
        plan: how to make it.

    Raises:
        InputError: too few vectors for the plan, or vectors that are not finite.
        BackendError: FAISS refuses, or there is no GPU.
    """
    rng = np.random.default_rng(plan.seed)
    count, width = vectors.shape
    trained = plan.kind != "flat"
    held = held_out(count, plan.seed) if trained else np.zeros(0, np.int64)
    seen = 0

    def sample(wanted: int) -> NDArray[np.float32]:
        nonlocal seen
        others = np.delete(np.arange(count), held)
        chosen = np.sort(rng.choice(others, min(wanted, len(others)), replace=False))
        seen = len(chosen)
        part = np.empty((len(chosen), width), np.float32)
        for start in range(0, len(chosen), 4096):  # in blocks, because the source may exceed the memory
            rows = chosen[start : start + 4096]
            part[start : start + 4096] = plan.space.prepare(np.asarray(vectors[rows]))
        return part

    start = time.perf_counter()
    index = make(plan, count, width, sample)
    train = time.perf_counter() - start
    queries = plan.space.prepare(np.asarray(vectors[held])) if len(held) else np.zeros((0, width), np.float32)
    nearest = NearestSoFar(queries, plan.space, NEIGHBOURS + 1)  # one more: a query finds itself
    target = to_gpu(index) if plan.gpu else index
    add = measure = 0.0
    # One reading of the vectors fills the index and gives the exact answers that recall is measured against.
    for first, block in prepared_blocks(vectors, plan.space):
        start = time.perf_counter()
        target.add(block)
        add += time.perf_counter() - start
        start = time.perf_counter()
        nearest.see(first, block)
        measure += time.perf_counter() - start
    if plan.gpu:
        index = load_faiss("an index").index_gpu_to_cpu(target)
    start = time.perf_counter()
    effort, share = None, 1.0
    if len(held):
        true = without_self(nearest.rows, held, NEIGHBOURS)

        def measured() -> float:
            return recall(without_self(index.search(queries, NEIGHBOURS + 1)[1], held, NEIGHBOURS), true)

        effort, share = tune(efforts(index), lambda one: set_effort(index, one), measured, plan.recall)
    measure += time.perf_counter() - start
    return BuiltIndex(index, plan, effort, share, len(held), seen, {"train": train, "add": add, "measure": measure})


def held_out(count: int, seed: int) -> NDArray[np.int64]:
    """Draw the numbers of the vectors that training must not see and recall is measured with: 256, or a quarter."""
    return np.sort(np.random.default_rng(seed).choice(count, min(_HELD_OUT, count // 4), replace=False))


def spool(batches: Iterable[VectorBatch], path: Path) -> tuple[NDArray[np.float32], Rows]:
    """Write a stream's vectors to a file.

    Returns:
        the vectors float32 ``(N, D)``, memory-mapped, and their rows.

    Raises:
        InputError: there is no vector, or widths differ.
        OutputError: the file cannot be written.
    """
    parts, width = [], None
    with output_errors(path), open(path, "wb") as handle:
        for batch in batches:
            if width not in (None, batch.vectors.shape[1]):
                raise InputError(f"vectors of {width} and of {batch.vectors.shape[1]} numbers; allowed: one width")
            width = batch.vectors.shape[1]
            handle.write(np.ascontiguousarray(batch.vectors, np.float32).data)
            parts.append(batch.rows)
    rows = Rows.concat(parts)
    if not len(rows) or width is None:
        raise InputError("there is nothing to index: no vector was given")
    return np.memmap(path, np.float32, "r", shape=(len(rows), width)), rows


def build_folder(
    folder: Path,
    origin: VectorOrigin,
    batches: Iterable[VectorBatch],
    options: IndexOptions,
    *,
    overwrite: bool = False,
) -> FolderIndex:
    """Build an index in a folder and open it.

    Args:
        folder: the index's folder.
        origin: what decides the vectors.
        batches: the vectors and their rows.
        options: the user's choices.
        overwrite: replace an index that is there, once the new one is whole.

    Raises:
        OutputError: the folder cannot be written, or holds something else.
        InputError: there is nothing to index, or the options do not fit the vectors.
        MissingExtraError: FAISS or pyarrow is not installed.
    """
    load_faiss("building an index")
    require("pyarrow", "index", "an index's rows")  # now, since it is used only after the slow work
    check_new(folder, overwrite)
    fresh = not folder.exists()
    held = False
    try:
        with held_folder(folder):
            held = True
            path = folder / f"vectors-{secrets.token_hex(4)}.tmp"
            try:
                vectors, rows = spool(batches, path)
                count, width = vectors.shape
                filled = fill(vectors, plan_for(options, count, width))
                del vectors  # closes the file: Windows cannot remove a file that is mapped
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            about = IndexInfo(origin, options.metric, filled.plan.kind, width, count, filled.report())
            write_index(folder, about, filled.index, rows)
    except BaseException:
        if fresh and held:  # not held: another run made the folder first
            _leave_nothing(folder)
        raise
    return FolderIndex.open(folder, gpu=options.gpu)


def _leave_nothing(folder: Path) -> None:
    """Remove a folder in which no index was finished."""
    with contextlib.suppress(OSError):
        if not (folder / "index.json").exists():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
