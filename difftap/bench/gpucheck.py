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
from difftap.bench.contenders import Contender, parse_backends
from difftap.bench.pictures import write_pictures
from difftap.bench.workers import call_timing, make_order, open_contender, stage_medians
from difftap.coords import Size
from difftap.engine import BACKENDS
from difftap.errors import BackendError, DifftapError, InputError
from difftap.export.parity import TensorParity
from difftap.machine import available_cores, cpu, gpu, gpu_memory
from difftap.recipe import Recipe

__all__ = ["SCHEMA", "Cell", "CellResult", "GpuCheck", "GpuCheckCase", "present", "run"]

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
class Cell:
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
        key: `Cell.key`.
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
    cells: tuple[tuple[Cell, CellResult], ...]
    absent: Mapping[str, str]
    conditions: Mapping[str, Any]


def present(names: str, device: str) -> tuple[list[Contender], dict[str, str]]:
    """The backends that a list names, as far as they can run on a device, and the reasons of those that cannot.

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


def cells_of(case: GpuCheckCase) -> Iterator[Cell]:
    """All cells, the reference's first at each size; on a CPU every batch would be the same run."""
    for size in case.sizes:
        first = Cell(case.reference, size, case.batches[0])
        yield first
        for contender in case.contenders:
            for batch in case.batches if contender.device != "cpu" else (1,):
                cell = Cell(contender, size, batch)
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
    case: GpuCheckCase, cell: Cell, threads: int, pictures: Sequence[Path], folder: Path, run: Run
) -> CellResult:
    """Run one cell and write it down; whatever happens to it is its result."""
    try:
        result = _measure(case, cell, threads, pictures, folder)
    except DifftapError as error:
        result = CellResult(cell.key, failed=str(error))
    record = json.loads(json.dumps(asdict(result), allow_nan=False))
    run.write(record)
    return CellResult(**record)


def _measure(case: GpuCheckCase, cell: Cell, threads: int, pictures: Sequence[Path], folder: Path) -> CellResult:
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


def _fidelity(case: GpuCheckCase, cell: Cell, mine: Path, folder: Path) -> dict[str, dict[str, float]]:
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
