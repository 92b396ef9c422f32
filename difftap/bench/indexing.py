"""Measure large indexes: build time, recall against exact search, queries per second and bytes; and FAISS directly.

Vectors are generated from a seed, in blocks, into a memory-mapped file. They form clusters of unequal size. Members of
a cluster vary along a few common directions, as features do, and a little along all directions. Queries are further
draws that are not in the index. FAISS used directly gets the same parameters, size of the training sample, blocks and
search effort, in the same run.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, output_errors
from difftap.artifacts.table import Table, TableColumn
from difftap.errors import InputError, OutputError
from difftap.machine import available_cores, cpu, peak_memory
from difftap.retrieval.builder import BuiltIndex, IndexOptions, fill, plan_for
from difftap.retrieval.kinds import FaissIndex, IndexMetric, load_faiss, set_effort
from difftap.retrieval.quality import exact_neighbours, prepared_blocks, recall

__all__ = ["SCHEMA", "IndexBench", "IndexCase", "IndexMeasurement", "format_table", "generate", "run", "to_json"]

SCHEMA = "difftap.bench.index/1"
_BLOCK = 8192  # vectors generated at once
_CLUSTERS = 1000
_COMMON = 48  # directions along which the members of all clusters vary
_SPREAD = 0.08  # along each; members then lie half as far from their centre as centres from the origin
_K = 10  # recall is measured at this many hits


@dataclass(frozen=True)
class IndexCase:
    """The vectors that are indexed.

    Attributes:
        vectors: N, their number.
        width: D, their dimensions.
        queries: Q, the number of queries.
        half: whether the file holds float16 instead of float32.
        seed: seed of the vectors.

    Raises:
        InputError: fewer than 1000 vectors, or no dimension or query.
    """

    vectors: int = 200_000
    width: int = 1280
    queries: int = 1000
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vectors < 1000 or min(self.width, self.queries) < 1:
            raise InputError(f"{self.vectors} vectors; allowed: 1000 or more, and 1 or more of width and queries")


@dataclass(frozen=True)
class IndexMeasurement:
    """The figures of one kind of index, made one way.

    Attributes:
        way: ``difftap``, or ``faiss`` for FAISS used directly.
        kind: the kind of index.
        parameters: lists, codes, refine, effort.
        train: seconds of training.
        add: seconds of adding, with reading and preparing the vectors.
        tune: seconds of the exact search of held-out queries and the choice of the effort; 0 for FAISS directly.
        recall: recall@10 of the queries against exact search.
        stated: recall@10 that the build itself measured on held-out vectors; None for FAISS directly.
        rates: queries per second in each round, all queries in one call.
        alone: queries per second, one query per call.
        nbytes: bytes of the saved index.
    """

    way: str
    kind: str
    parameters: JsonObject
    train: float
    add: float
    tune: float
    recall: float
    stated: float | None
    rates: tuple[float, ...]
    alone: float
    nbytes: int


@dataclass(frozen=True)
class IndexBench:
    """The result; times in seconds.

    Attributes:
        case: the vectors.
        metric: the index's metric.
        generated: seconds to make the file; 0 if it existed.
        exact: seconds of the exact search of all queries.
        measured: one entry per kind and way.
        peak: peak resident bytes of the process, including pages of the memory-mapped file.
        conditions: machine and versions.
    """

    case: IndexCase
    metric: str
    generated: float
    exact: float
    measured: list[IndexMeasurement]
    peak: int
    conditions: JsonObject


def _draw(case: IndexCase) -> Callable[[int, int], NDArray[np.float32]]:
    """Make a function that gives the vectors ``(n, D)`` of a block, by the block's number and its length n."""
    rng = np.random.default_rng([case.seed, case.width])
    clusters = min(_CLUSTERS, max(10, case.vectors // 50))
    centres = rng.standard_normal((clusters, case.width), np.float32)
    shares = rng.pareto(2.0, clusters) + 0.2
    directions = rng.standard_normal((min(_COMMON, case.width), case.width), np.float32) * np.float32(_SPREAD)

    def block(number: int, count: int) -> NDArray[np.float32]:
        one = np.random.default_rng([case.seed, case.width, number])
        which = one.choice(clusters, count, p=shares / shares.sum())
        vary = one.standard_normal((count, len(directions)), np.float32) @ directions
        noise = one.standard_normal((count, case.width), np.float32)
        return np.asarray(centres[which] + vary + np.float32(0.1) * noise, np.float32)

    return block


def generate(case: IndexCase, path: Path) -> tuple[NDArray[np.floating], float]:
    """Make the file of the vectors, or use a whole one again.

    Returns:
        the vectors ``(N, D)``, memory-mapped, and the seconds it took to make them.

    Raises:
        OutputError: the file cannot be written, or another file has its name.
    """
    kind = np.dtype(np.float16 if case.half else np.float32)
    shape = (case.vectors, case.width)
    size = case.vectors * case.width * kind.itemsize
    mark = path.with_name(f"{path.name}.case")
    seconds = 0.0
    if not mark.exists() or mark.read_text(encoding="utf-8") != _mark(case):
        if path.exists() and not mark.exists():
            raise OutputError(f"cannot write '{path}': a file stands there; choose another")
        mark.unlink(missing_ok=True)
        start = time.perf_counter()
        block = _draw(case)
        with output_errors(path), open(path, "wb") as handle:
            for number, low in enumerate(range(0, case.vectors, _BLOCK)):
                handle.write(block(number, min(_BLOCK, case.vectors - low)).astype(kind).data)
        mark.write_text(_mark(case), encoding="utf-8")  # last: without it, the file counts as unfinished
        seconds = time.perf_counter() - start
    if path.stat().st_size != size:
        raise OutputError(f"'{path}' has {path.stat().st_size} bytes in place of {size}; remove it")
    return np.memmap(path, kind, "r", shape=shape), seconds


def _mark(case: IndexCase) -> str:
    return f"difftap.bench.index {case.vectors} {case.width} {case.half} {case.seed}\n"


def run(
    case: IndexCase,
    kinds: tuple[str, ...],
    path: Path,
    options: IndexOptions,
    *,
    direct: bool = True,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> IndexBench:
    """Build and search every kind of index, with difftap and with FAISS directly.

    Args:
        case: the vectors.
        kinds: the kinds of index.
        path: the vectors' file; made if it does not exist, and not removed.
        options: options of all kinds; their ``kind`` is not used.
        direct: also measure FAISS used directly.
        repeats: rounds of searching.
        say: called with what is being done.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    faiss = load_faiss("bench index")
    load = os.getloadavg()
    say(f"{case.vectors} vectors of {case.width} in {path}")
    vectors, generated = generate(case, path)
    space = IndexMetric(options.metric)
    queries = space.prepare(_draw(case)(math.ceil(case.vectors / _BLOCK) + 1, case.queries))
    say("the exact answer")
    start = time.perf_counter()
    true = exact_neighbours(vectors, queries, space, _K)
    exact = time.perf_counter() - start
    measured = []
    for kind in kinds:
        given = options if kind == "ivf-pq" else replace(options, codes=None, refine=False)
        given = replace(given, kind=kind, lists=given.lists if kind.startswith("ivf") else None)
        say(f"{kind}: building")
        filled = fill(vectors, plan_for(given, *vectors.shape))
        one, sampled = _ours(filled, queries, true, repeats), filled.sampled
        del filled  # frees the memory before FAISS builds its own index
        measured.append(one)
        if direct:
            say(f"{kind}: FAISS itself")
            measured.append(_direct(faiss, vectors, given, one, sampled, queries, true, repeats))
    return IndexBench(
        case,
        options.metric,
        generated,
        exact,
        measured,
        peak_memory(),
        {
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "faiss": faiss.__version__,
            },
            "cpu": cpu(),
            "cores": available_cores(),
            "threads": int(faiss.omp_get_max_threads()),
            "load_before": load[0],
            "load_after": os.getloadavg()[0],
            "repeats": repeats,
            "inside": "searching: from prepared queries in memory to rows; adding: from the file to the index",
        },
    )


def _ours(filled: BuiltIndex, queries: NDArray[np.float32], true: NDArray[np.int64], repeats: int) -> IndexMeasurement:
    report = filled.report()
    return IndexMeasurement(
        way="difftap",
        kind=filled.plan.kind,
        parameters={**report["parameters"], "effort": filled.effort},
        train=filled.seconds["train"],
        add=filled.seconds["add"],
        tune=filled.seconds["measure"],
        stated=filled.recall,
        **_searched(filled.index, queries, true, repeats),
    )


def _searched(index: FaissIndex, queries: NDArray[np.float32], true: NDArray[np.int64], repeats: int) -> JsonObject:
    """Measure recall, rates and size of a finished index."""
    found = index.search(queries, _K)[1]  # warm-up
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        index.search(queries, _K)
        rates.append(len(queries) / (time.perf_counter() - start))
    few = queries[:100]
    start = time.perf_counter()
    for query in few:
        index.search(query[None], _K)
    alone = len(few) / (time.perf_counter() - start)
    return {"recall": recall(found, true), "rates": tuple(rates), "alone": alone, "nbytes": _size(index)}


def _size(index: FaissIndex) -> int:
    """Count the bytes of the index as it would be saved, without writing a file."""
    faiss = load_faiss("an index")
    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(count, 1 << 20))
    return total


def _direct(
    faiss: ModuleType,
    vectors: NDArray[np.floating],
    options: IndexOptions,
    ours: IndexMeasurement,
    sampled: int,
    queries: NDArray[np.float32],
    true: NDArray[np.int64],
    repeats: int,
) -> IndexMeasurement:
    """Measure FAISS by its own factory, with our index's parameters, sample size, blocks and effort."""
    count, width = vectors.shape
    plan = plan_for(options, count, width)
    product = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2, "l1": faiss.METRIC_L1}[plan.space.product]
    lists, codes = ours.parameters["lists"], ours.parameters["codes"]
    text = {"flat": "Flat", "ivf": f"IVF{lists},Flat", "ivf-pq": f"IVF{lists},PQ{codes}", "hnsw": "HNSW32"}[plan.kind]
    start = time.perf_counter()
    index = faiss.index_factory(width, text + (",Refine(SQ8)" if plan.refine else ""), product)
    if plan.kind == "hnsw":
        index.hnsw.efConstruction = 100
    if sampled:
        chosen = np.sort(np.random.default_rng(1).choice(count, sampled, replace=False))
        index.train(plan.space.prepare(np.asarray(vectors[chosen])))
    train = time.perf_counter() - start
    start = time.perf_counter()
    for _, block in prepared_blocks(vectors, plan.space):
        index.add(block)
    add = time.perf_counter() - start
    set_effort(index, ours.parameters["effort"])
    if plan.refine:
        index.k_factor = 8.0
    found = _searched(index, queries, true, repeats)
    return IndexMeasurement("faiss", plan.kind, dict(ours.parameters), train, add, 0.0, stated=None, **found)


def format_table(result: IndexBench) -> Iterator[str]:
    """Yield the result as lines for people."""
    case, conditions = result.case, result.conditions
    yield (
        f"{case.vectors:,} vectors of {case.width} ({'float16' if case.half else 'float32'} file), {result.metric}, "
        f"{case.queries} queries; {conditions['cpu']}, {conditions['threads']} threads, "
        f"load {conditions['load_before']:.1f} before"
    )
    columns = (
        TableColumn("", left=True),
        TableColumn("recall@10", form=".4f"),
        TableColumn("queries/s", form=".0f"),
        TableColumn("one by one", form=".0f"),
        TableColumn("train s", form=".1f"),
        TableColumn("add s", form=".1f"),
        TableColumn("MB", form=".0f"),
    )
    rows = tuple(
        (
            f"{one.kind}, {one.way}",
            one.recall,
            float(np.median(one.rates)),
            one.alone,
            one.train,
            one.add,
            one.nbytes / 2**20,
        )
        for one in result.measured
    )
    yield from Table(columns, rows).text()
    for one in result.measured:
        if one.stated is not None:
            parameters = ", ".join(f"{name} {value}" for name, value in one.parameters.items() if value is not None)
            yield (
                f"{one.kind}: {parameters}; stated recall {one.stated:.4f}; {one.tune:.0f} s for the exact answer of "
                "held-out queries and the effort"
            )
    yield (
        f"made in {result.generated:.0f} s; exact answer in {result.exact:.0f} s "
        f"({case.queries / result.exact:.0f} queries/s); peak memory {result.peak / 2**30:.1f} GB, pages of the "
        "file among it"
    )


def to_json(result: IndexBench) -> JsonObject:
    """Give the result as plain data."""
    return {"schema": SCHEMA, **asdict(result)}
