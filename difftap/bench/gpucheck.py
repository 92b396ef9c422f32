"""One run over everything a GPU machine can do: every backend, precision, resolution and batch size, cell by cell.

A cell is built, run, timed and held against the reference in a process of its own, under a time limit: one that runs
out of memory, hangs or dies is a line in the table that says so. Finished cells are kept in a file of JSON lines, and
a run that was stopped goes on where it was. Nothing needs the network.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difftap.artifacts.files import output_errors
from difftap.artifacts.run import Run, open_run
from difftap.artifacts.table import Cell, Table, TableColumn
from difftap.bench.contenders import Contender, parse_backends
from difftap.bench.pictures import write_pictures
from difftap.bench.workers import Worker, call_timing, make_order, open_contender, stage_medians
from difftap.coords import Size
from difftap.engine import BACKENDS
from difftap.errors import BackendError, DifftapError, InputError
from difftap.export.parity import TensorParity
from difftap.machine import available_cores, cpu, gpu, gpu_memory
from difftap.recipe import Recipe

__all__ = [
    "SCHEMA",
    "CellResult",
    "FaissCheck",
    "GpuCheck",
    "GpuCheckCase",
    "GpuCheckCell",
    "check_faiss",
    "format_gpu_check",
    "present",
    "run",
    "search_faiss",
    "to_json",
]


_YARDSTICKS = ("torch:fp16", "ort:fp16", "ort:fp32")

"""What the fastest is compared with, where it was measured."""


def to_json(result: GpuCheck) -> dict[str, Any]:
    """Give the result as plain data, with the schema's name and version first; docs/gpu.md describes it."""
    return {
        "schema": SCHEMA,
        "conditions": dict(result.conditions),
        "limit": result.case.limit,
        "absent": dict(result.absent),
        "cells": [
            {
                "backend": cell.contender.name,
                "precision": cell.contender.precision,
                "device": cell.contender.device,
                "size": list(cell.size),
                "batch": cell.batch,
                **asdict(one),
                "sound": one.sound,
            }
            for cell, one in result.cells
        ],
    }


def format_gpu_check(result: GpuCheck) -> list[str]:
    """Lines for a terminal."""
    case, at = result.case, result.conditions
    recipe = case.recipe
    branches = " with ".join(f"{'+'.join(b.taps)} at t={b.timestep}" for b in recipe.branches)
    lines = [
        f"{recipe.model}, {branches}, ensemble {recipe.ensemble}; {at['gpu'] or 'no NVIDIA GPU'}; "
        f"{at['cpu']}, {at['threads']} threads; difftap {at['difftap']}"
    ]
    for size in case.sizes:
        lines += _table(result, size)
    lines += [f"not run: {name}: {reason}" for name, reason in result.absent.items()]
    lines.append(f"reference: {case.reference.label}; parity is that of the first picture's features")
    lines.append(f"timed: {at['inside']}")
    return lines


def _table(result: GpuCheck, size: tuple[int, int]) -> list[str]:
    rows = [(cell, one) for cell, one in result.cells if cell.size == size]
    columns = (TableColumn(f"{size[0]} x {size[1]}", left=True), *_COLUMNS)
    return ["", *Table(columns, tuple(_row(cell, one) for cell, one in rows)).text(), *_summary(rows)]


_COLUMNS = (
    TableColumn("batch"),
    TableColumn("images/s", form=".3g"),
    TableColumn("ms/image", "ms", ".1f", unit_shown=False),
    *(TableColumn(head, "ms", ".1f", unit_shown=False) for head in ("low", "high", "VAE", "UNet")),
    TableColumn("GPU", "MB", ".0f"),
    TableColumn("build s", form=".0f"),
    TableColumn("open s", form=".1f"),
    TableColumn("relative", form=".1e"),
    TableColumn("cosine", form=".6f"),
    TableColumn("parity", left=True),
)


def _row(cell: GpuCheckCell, one: CellResult) -> tuple[Cell, ...]:
    start = (cell.contender.label, cell.batch)
    if one.failed is not None or one.timing is None or one.rate is None:
        return (*start, *(None,) * (len(_COLUMNS) - 2), f"not run: {one.failed}")
    worst = max((two["relative"] for two in one.fidelity.values()), default=None)
    cosine = min((two["cosine_mean"] for two in one.fidelity.values()), default=None)
    times = [*(one.timing[name] for name in ("median", "low", "high")), *(one.stages.get(n) for n in ("vae", "unet"))]
    parity = {None: "the reference" if not one.fidelity else "", True: "good", False: "LOW"}[one.sound]
    opened = one.open_seconds or 0.0
    return (*start, one.rate, *times, one.device_peak, one.build_seconds, opened, worst, cosine, parity)


def _summary(rows: list[tuple[GpuCheckCell, CellResult]]) -> list[str]:
    """Find the fastest cell whose features are right, and how it stands to the yardsticks' own best."""
    timed = [(cell, one.rate) for cell, one in rows if one.rate is not None and one.sound is not False]
    if not timed:
        return ["fastest: nothing was measured"]
    best, rate = max(timed, key=lambda pair: pair[1])
    against = []
    for label in _YARDSTICKS:
        theirs = [other for cell, other in timed if cell.contender.label == label]
        if theirs and label != best.contender.label:
            against.append(f"{rate / max(theirs):.2f} x {label}")
    ratios = f" = {', '.join(against)} at their best batches" if against else ""
    return [f"fastest: {rate:.3g} images/s, {best.contender.label} at batch {best.batch}{ratios}"]


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
    """Search in a child process, which a broken CUDA build may take down; it is ended after ``limit`` seconds."""
    try:
        with Worker(available_cores()) as worker:
            return FaissCheck(**worker.ask("faiss", limit, device=device))
    except BackendError as error:
        return FaissCheck(str(error), device=device)


def search_faiss(device: str) -> FaissCheck:
    """Compare the neighbours that FAISS finds on a device with those of numpy in float64."""
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


SCHEMA = "difftap.bench.gpu-check/1"


@dataclass(frozen=True)
class GpuCheckCase:
    """What is checked.

    Attributes:
        recipe: what is extracted; its size is replaced by each of ``sizes``.
        contenders: backends in their precisions, and rivals.
        device: where they run, for the report.
        sizes: network inputs, ``(W, H)`` in pixels.
        batches: images in one engine run; a CPU takes one at a time.
        limit: seconds a cell may take, building included.
        seconds: least length of the timed part.
        threads: CPU threads; None for all.
        cache: the cache folder.
    """

    recipe: Recipe
    contenders: tuple[Contender, ...]
    device: str = "cuda"
    sizes: tuple[Size, ...] = ((512, 512), (768, 768))
    batches: tuple[int, ...] = (1, 4, 8)
    limit: float = 900.0
    seconds: float = 3.0
    threads: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.contenders:
            raise InputError("no backend can run here, and no rival was named")
        if self.recipe.learned is not None:
            raise InputError("this check is of speed, for which texts do; leave the learned prompts out")
        if not self.sizes or not self.batches or min(self.batches) < 1:
            raise InputError(f"sizes are {self.sizes}, batches {self.batches}; allowed: at least one of each, from 1")
        if not 0 < self.limit < float("inf") or not 0 <= self.seconds < float("inf"):
            raise InputError(f"limit is {self.limit}, seconds {self.seconds}; allowed: a limit above 0, seconds from 0")

    @property
    def reference(self) -> Contender:
        """Whose features the others' are compared with: torch in fp32, else the first that computes in fp32."""
        exact = [one for one in self.contenders if one.precision == "fp32" and not one.rival]
        torch = [one for one in exact if one.name == "torch"]
        return next(iter([*torch, *exact, *self.contenders]))


@dataclass(frozen=True)
class GpuCheckCell:
    """One contender at one resolution and batch size."""

    contender: Contender
    size: Size
    batch: int

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.contender.label}@{self.contender.device} {self.size[0]}x{self.size[1]} batch {self.batch}"


@dataclass(frozen=True)
class CellResult:
    """One cell's figures; times in seconds an image, memory in bytes.

    Attributes:
        key: `GpuCheckCell.key`.
        failed: why there are no figures; None if there are.
        rate: images a second, by the median call: from picture files to feature maps in host memory.
        timing: of whole calls, divided by their images.
        stages: median by stage, among them ``vae`` and ``unet``.
        build_seconds: of the first opening, where something had to be built or exported; else None.
        open_seconds: to open what was built.
        device_peak: held on the GPU after the timed part, over what was held before.
        fidelity: by output, against the reference; empty for the reference, or where there is none.
        about: runtime version, device it really ran on, members in a run.
    """

    key: str
    failed: str | None = None
    rate: float | None = None
    timing: Mapping[str, Any] | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    build_seconds: float | None = None
    open_seconds: float | None = None
    device_peak: int | None = None
    fidelity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool | None:
        """Whether it is near enough to the reference: relative 1e-3 in fp32, else a mean cosine of 0.99; None unknown.

        An engine that fell back to another device than it was asked for is not sound either.
        """
        if self.failed is not None or not self.fidelity:
            return None
        if ":fp32@" in self.key:
            return max(one["relative"] for one in self.fidelity.values()) <= 1e-3
        return min(one["cosine_mean"] for one in self.fidelity.values()) >= 0.99


@dataclass(frozen=True)
class GpuCheck:
    """The result: cells in order, what could not take part and why, and the conditions."""

    case: GpuCheckCase
    cells: tuple[tuple[GpuCheckCell, CellResult], ...]
    absent: Mapping[str, str]
    conditions: Mapping[str, Any]


def present(names: str, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Find the backends that a list names, as far as they can run on a device, and the reasons of those that cannot.

    Args:
        names: ``all``, or backends with commas between, with or without ``:precision``.
        device: ``cuda`` or ``cpu``.

    Raises:
        InputError: a name or a precision is unknown.
    """
    found: list[Contender] = []
    absent: dict[str, str] = {}
    listed = [part.strip() for part in names.split(",") if part.strip()]
    for part in list(BACKENDS) if listed == ["all"] else listed:
        try:
            found += parse_backends(part, device)[0]
        except BackendError as error:
            absent[part] = str(error)
    return list(dict.fromkeys(found)), absent


def cells_of(case: GpuCheckCase) -> Iterator[GpuCheckCell]:
    """All cells, the reference's first at each size; on a CPU every batch would be the same run."""
    for size in case.sizes:
        first = GpuCheckCell(case.reference, size, case.batches[0])
        yield first
        for contender in case.contenders:
            for batch in case.batches if contender.device != "cpu" else (1,):
                cell = GpuCheckCell(contender, size, batch)
                if cell.key != first.key:
                    yield cell


def run(
    case: GpuCheckCase,
    folder: Path,
    absent: Mapping[str, str],
    say: Callable[[str], None] = lambda text: None,
    overwrite: bool = False,
) -> GpuCheck:
    """Run every cell that is not in the folder yet.

    Args:
        case: what.
        folder: where finished cells are kept; made if it is not there.
        absent: what cannot take part, for the report.
        say: told what is being done, a line at a time.
        overwrite: start afresh.

    Raises:
        OutputError: the folder cannot be written, or holds another run's cells.
    """
    threads = case.threads or available_cores()
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(folder)
    conditions = _conditions(case, threads)
    path = folder / "gpu-check.jsonl"
    with open_run(path, {"schema": SCHEMA, **conditions}, overwrite=overwrite) as run:
        done = {record["key"]: CellResult(**record) for record in run.earlier}
        listed = list(dict.fromkeys(cells_of(case)))
        for count, cell in enumerate(listed, 1):
            if cell.key in done:
                continue
            say(f"{count} of {len(listed)}: {cell.key}")
            done[cell.key] = _finish(case, cell, threads, pictures, folder, run)
            say("  " + (done[cell.key].failed or f"{done[cell.key].rate:.3g} images/s"))
    return GpuCheck(case, tuple((cell, done[cell.key]) for cell in listed), absent, conditions)


def _conditions(case: GpuCheckCase, threads: int) -> dict[str, Any]:
    from difftap.version import __version__

    recipe = case.recipe.to_dict()
    del recipe["size"]
    return {
        "difftap": __version__,
        "recipe": recipe,
        "random_weights": case.recipe.model.random_weights,
        "revision": case.recipe.model.revision,
        "device": case.device,
        "gpu": gpu(),
        "cpu": cpu(),
        "threads": threads,
        "seconds": case.seconds,
        "inside": "decode, resize, noise, VAE, UNet, features in host memory; not building, opening or warm-up",
    }


def _finish(
    case: GpuCheckCase, cell: GpuCheckCell, threads: int, pictures: Sequence[Path], folder: Path, run: Run
) -> CellResult:
    """Run one cell and write it down; whatever happens to it is its result."""
    try:
        result = _measure(case, cell, threads, pictures, folder)
    except DifftapError as error:
        result = CellResult(cell.key, failed=str(error))
    record = json.loads(json.dumps(asdict(result), allow_nan=False))
    run.write(record)
    return CellResult(**record)


def _measure(
    case: GpuCheckCase, cell: GpuCheckCell, threads: int, pictures: Sequence[Path], folder: Path
) -> CellResult:
    order = make_order(
        dataclasses.replace(case.recipe, size=cell.size),
        pictures,
        cache=case.cache,
        threads=threads,
        batch=cell.batch,
    )
    end = time.monotonic() + case.limit
    before = gpu_memory()
    worker, opened, built = open_contender(
        {**order, "contender": asdict(cell.contender)}, lambda: end - time.monotonic()
    )
    try:
        mine = folder / ".features.npz"
        told = worker.ask("round", end - time.monotonic(), seconds=case.seconds, matching=False, features=str(mine))
        after = gpu_memory()
    finally:
        worker.close()
    if opened["device"] != cell.contender.device:
        raise BackendError(f"asked for {cell.contender.device}, it ran on {opened['device']}")
    timing = call_timing(told["calls"])
    return CellResult(
        cell.key,
        rate=1.0 / timing.median,
        timing=asdict(timing),
        stages=stage_medians(told["calls"]),
        build_seconds=built,
        open_seconds=opened["open"],
        device_peak=None if before is None or after is None else max(0, after - before),
        fidelity=_fidelity(case, cell, mine, folder),
        about={name: opened[name] for name in ("version", "device", "together", "notes")},
    )


def _fidelity(case: GpuCheckCase, cell: GpuCheckCell, mine: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Keep the reference's features of the first picture; compare everyone else's with them."""
    kept = folder / f"reference-{cell.size[0]}x{cell.size[1]}.npz"
    if cell.contender == case.reference and cell.batch == case.batches[0]:
        with output_errors(kept):
            mine.replace(kept)
        return {}
    try:
        if not kept.is_file():
            return {}
        with np.load(mine, allow_pickle=False) as got, np.load(kept, allow_pickle=False) as wanted:
            return {name: TensorParity.of(got[name][None], wanted[name][None]).to_dict() for name in wanted}
    finally:
        mine.unlink(missing_ok=True)
