"""How many images a second: our backends in all their precisions against the ways people do it today, in one run.

Every contender has a process of its own. Rounds are interleaved: each round asks every contender in turn, so whatever
else the machine does falls on all of them. Processes stay alive between rounds where all fit into memory together; else
each is ended after its turn and started again for the next (A B A B). Before its first turn a process is warmed up. All
contenders get the same images and the same noise, and their features are compared in the same run.

`run` takes a `ThroughputCase` and gives a `Throughput`, which is printed as a table, and written as JSON and a picture.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difftap.artifacts.files import output_errors, write_atomic
from difftap.artifacts.table import Cell, Table, TableColumn
from difftap.bench.contenders import Contender
from difftap.bench.pictures import write_pictures
from difftap.bench.workers import Timing, Worker, call_timing, make_order, open_contender, stage_medians
from difftap.errors import BackendError, DifftapError, InputError, require
from difftap.export.parity import TensorParity
from difftap.images import load_image
from difftap.machine import available_cores, available_memory, cpu, gpu, gpu_memory
from difftap.recipe import Recipe

__all__ = [
    "OWN_STAGES",
    "SCHEMA",
    "Throughput",
    "ThroughputCase",
    "ThroughputRow",
    "format_throughput",
    "run",
    "save_throughput",
    "to_json",
]


SCHEMA = "difftap.bench.throughput/1"

_COLOURS = {"vae": "#1f6f8b", "unet": "#d1495b", "own": "#edae49"}


def to_json(result: Throughput) -> dict[str, Any]:
    """Give the result as plain data, with the schema's name and version first; docs/throughput.md describes it."""
    case = asdict(result.case)
    case["recipe"] = result.case.recipe.to_dict()
    case["cache"] = str(result.case.cache) if result.case.cache else None
    case["images"] = [str(path) for path in result.case.images]
    return {
        "schema": SCHEMA,
        "case": case,
        "conditions": dict(result.conditions),
        "macs": dict(result.macs),
        "gemm": dict(result.gemm),
        "reference": result.reference,
        "rows": [_row_json(row) for row in result.rows],
    }


def _row_json(row: ThroughputRow) -> dict[str, Any]:
    data = asdict(row)
    label = {"label": row.contender.label, "rival": row.contender.rival}
    return {**label, **data, "fidelity": {name: one.to_dict() for name, one in row.fidelity.items()}}


def format_throughput(result: Throughput) -> list[str]:
    """Lines for a terminal."""
    case, at = result.case, result.conditions
    recipe = case.recipe
    branches = " with ".join(f"{'+'.join(b.taps)} at t={b.timestep}" for b in recipe.branches)
    head = (
        f"{at['model']['name']}, {recipe.size[0]} x {recipe.size[1]}, {branches}, ensemble {recipe.ensemble} "
        f"({recipe.noise}), batch {case.batch}, {at['threads']} threads"
    )
    lines = [head, *Table(_COLUMNS, tuple(_cells(row) for row in result.rows)).text()]
    lines += [f"  {row.contender.label}: {note}" for row in result.rows for note in row.about.get("notes", ())]
    own = [row for row in result.rows if row.own_share is not None]
    for row in own:
        parts = ", ".join(f"{kind} {1e3 * row.stages.get(kind, 0.0):.1f}" for kind in OWN_STAGES)
        lines.append(
            f"  {row.contender.label}: {100 * (row.own_share or 0):.2f} % around the engine calls; ms: {parts}"
        )
    if result.reference:
        lines.append(f"relative error and mean cosine: first image's features against {result.reference}")
    products = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in result.gemm.items())
    lines.append(f"matrix products in this run, GFLOP/s: {products}")
    if result.macs["vae"] is not None and result.macs["unet"] is not None:
        lines.append(f"GMAC: VAE {result.macs['vae'] / 1e9:.1f}, UNet {result.macs['unet'] / 1e9:.1f} a member")
    else:
        lines.append(f"arithmetic not counted: {at.get('uncounted')}")
    kept = "processes kept alive between rounds" if at["resident"] else "a fresh process each turn"
    graphics = f"; {at['gpu']}" if at.get("gpu") else ""
    lines += [
        f"{at['cpu']}, {at['cores']} cores{graphics}; load {at['load_before']:.1f} to {at['load_after']:.1f}; "
        f"{at['rounds']} rounds, interleaved, {kept}",
        f"warm-up: {at['warm_up']}; timed: {at['inside']}",
    ]
    return lines


_COLUMNS = (
    TableColumn("way", left=True),
    TableColumn("images/s", form=".3g"),
    TableColumn("ratio"),
    *(TableColumn(head) for head in ("ms/image", "low", "high", "decode", "VAE", "UNet", "match")),
    TableColumn("own", "%", ".2f"),
    TableColumn("peak", "MB", ".0f"),
    TableColumn("GFLOP/s", "GFLOP/s", ".0f", unit_shown=False),
    TableColumn("of GEMM"),
    TableColumn("relative", form=".1e"),
    TableColumn("cosine", form=".6f"),
    TableColumn("", left=True),
)


def _cells(row: ThroughputRow) -> tuple[Cell, ...]:
    if row.failed is not None or row.timing is None or row.rate is None:
        return (row.contender.label, *(None,) * (len(_COLUMNS) - 2), f"not measured: {row.failed}")

    def milli(seconds: float | None) -> str | None:
        # From ten seconds an image on, a tenth of a millisecond says nothing.
        return None if seconds is None else f"{1e3 * seconds:.{1 if seconds < 10 else 0}f}"

    worst = max((one.relative for one in row.fidelity.values()), default=None)
    cosine = min((one.cosine_mean for one in row.fidelity.values()), default=None)
    times = [row.timing.median, row.timing.low, row.timing.high]
    stages = [row.stages.get(name) for name in ("decode", "vae", "unet")]
    return (
        row.contender.label,
        row.rate,
        None if row.ratio is None else f"{row.ratio:.2f}x",
        *(milli(seconds) for seconds in (*times, *stages, row.matching)),
        row.own_share,
        row.peak or 0,
        row.flop_rate,
        None if row.gemm_share is None else f"{100 * row.gemm_share:.0f} %",
        worst,
        cosine,
        "" if row.device_peak is None else f"{row.device_peak / 1e6:.0f} MB on the GPU",
    )


def save_throughput(result: Throughput, folder: Path) -> list[Path]:
    """Write ``throughput.json``, ``throughput.txt`` and, where matplotlib is installed, ``throughput.png``.

    Raises:
        OutputError: the folder cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "throughput.json", folder / "throughput.txt", folder / "throughput.png"]
    write_atomic(files[0], json.dumps(to_json(result), indent=1, allow_nan=False) + "\n")
    write_atomic(files[1], "\n".join(format_throughput(result)) + "\n")
    write_atomic(files[2], draw_throughput(result))
    return files


def draw_throughput(result: Throughput) -> bytes:
    """Draw a PNG: time an image by stage, one bar a contender, with its images a second and its ratio.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench", "drawing plots").use("Agg")
    rows = [row for row in reversed(result.rows) if row.timing is not None and row.rate is not None]
    figure = require("matplotlib.figure", "bench", "drawing plots").Figure(
        figsize=(9, 1.9 + 0.42 * max(1, len(rows))), layout="constrained"
    )
    axes = figure.add_subplot()
    recipe, at = result.case.recipe, result.conditions
    axes.set_title(
        f"{at['model']['name']}, {recipe.size[0]} x {recipe.size[1]} px, ensemble {recipe.ensemble}, batch "
        f"{result.case.batch}\n{at.get('gpu') or at['cpu']}, {at['threads']} threads",
        fontsize=10,
    )
    left = [0.0] * len(rows)
    for stage in ("vae", "unet", "own"):
        widths = [_width(row, stage) for row in rows]
        names = {"vae": "VAE", "unet": "UNet", "own": "decoding, noise, copies, checks, joining"}
        axes.barh(range(len(rows)), widths, left=left, color=_COLOURS[stage], label=names[stage])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        ratio = "" if row.ratio is None else f", {row.ratio:.2f} x"
        high = row.timing.high if row.timing else 0.0
        left[place] = max(left[place], high)
        axes.text(left[place], place, f"  {row.rate:.3g} images/s{ratio}", va="center", fontsize=8)
        if row.timing is not None:
            axes.plot([row.timing.low, high], [place, place], color="#333333", lw=1)
    axes.set_yticks(range(len(rows)), [row.contender.label for row in rows], fontsize=8)
    axes.set(xlabel="seconds an image: median by stage; line: fastest to slowest", xlim=(0, 1.28 * max(left or [1.0])))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    if rows:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()


def _width(row: ThroughputRow, stage: str) -> float:
    """Measure a bar's part: medians of stages, and for the rest what brings the bar to the median of whole calls."""
    engines = row.stages.get("vae", 0.0) + row.stages.get("unet", 0.0)  # a network may have no encoder
    if stage != "own":
        return row.stages.get(stage, 0.0)
    return max(0.0, (row.timing.median if row.timing else engines) - engines)


OWN_STAGES = ("decode", "resize", "noise", "join", "rest")

"""What of a call is our pipeline's and not the engines'."""


@dataclass(frozen=True)
class ThroughputCase:
    """What is measured.

    Attributes:
        recipe: what is extracted; its noise must be drawn, not ``none``, where a rival takes part.
        contenders: who takes part, in the order of the table; ratios are to the first rival.
        rounds: turns of each contender.
        seconds: each turn makes at least one call, and goes on for this long.
        batch: images in one engine run on a GPU; on a CPU each image is a run.
        threads: CPU threads; None for all.
        images: files to extract from; generated pictures by default.
        matching: also time matching one pair's keypoints, once a contender.
        resident: whether processes stay alive between rounds; None to let memory decide.
        cache: the cache folder.
    """

    recipe: Recipe
    contenders: tuple[Contender, ...]
    rounds: int = 3
    seconds: float = 2.0
    batch: int = 1
    threads: int | None = None
    images: tuple[Path, ...] = ()
    matching: bool = True
    resident: bool | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.contenders:
            raise InputError("no backend and no rival takes part; name one by --backends or --rivals")
        for name in ("rounds", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: a whole number above 0")
        if not 0 <= self.seconds < float("inf"):
            raise InputError(f"seconds is {self.seconds}; allowed: 0 or more")
        if self.recipe.noise == "none" and any(one.rival for one in self.contenders):
            raise InputError("the rivals draw noise, as DIFT does; with noise 'none' give --rivals none")
        if self.recipe.learned is not None:
            raise InputError(
                f"the recipe has learned prompts ('{self.recipe.learned.path}'), under which the networks take as long "
                "as under texts; leave them out"
            )
        if self.recipe.combine == "score-product" and len(self.recipe.branches) > 1:
            raise InputError("combine is 'score-product', which gives no map; allowed here: concat, score-sum")


@dataclass(frozen=True)
class ThroughputRow:
    """One contender's figures; times in seconds an image, memory in bytes.

    Attributes:
        contender: who.
        failed: why there are no figures; None if there are.
        timing: of whole calls, divided by their images.
        stages: median by stage: ``vae``, ``unet``, and of ours those of `OWN_STAGES`.
        own_share: share of ours outside the two engine calls, from the medians; None for a rival.
        matching: median seconds of matching one pair's keypoints; None where it was not measured.
        rate: images a second, by the median.
        ratio: to the first rival that finished.
        flop: operations an image that this contender's own way takes (two a multiply-add).
        flop_rate: of those, a second, within the engine calls.
        gemm_share: that over the fastest matrix product of the run.
        peak: most resident memory of its process, before matching.
        device_peak: what its process held on the GPU after its first turn.
        open_seconds: to open, without the warm-up.
        fidelity: by output: against the reference's features of the first image.
        about: ``version``, ``device``, ``together`` (members in a run), ``notes``.
    """

    contender: Contender
    failed: str | None = None
    timing: Timing | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    own_share: float | None = None
    matching: float | None = None
    rate: float | None = None
    ratio: float | None = None
    flop: float | None = None
    flop_rate: float | None = None
    gemm_share: float | None = None
    peak: int | None = None
    device_peak: int | None = None
    open_seconds: float | None = None
    fidelity: Mapping[str, TensorParity] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Throughput:
    """The result.

    Attributes:
        case: what was measured.
        rows: in the order of the contenders.
        reference: label of whose features the others are compared with: the first rival, else the first in fp32.
        gemm: operations a second of matrix products in the same run, by kind, median over rounds.
        macs: multiply-adds: ``vae`` of one encoding, ``unet`` of one member; None where not counted.
        conditions: machine, versions, model, warm-up, load, how processes were kept.
    """

    case: ThroughputCase
    rows: tuple[ThroughputRow, ...]
    reference: str | None
    gemm: Mapping[str, float]
    macs: Mapping[str, int | None]
    conditions: Mapping[str, Any]

    def row(self, label: str) -> ThroughputRow:
        """Find the row of ``name:precision``.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.contender.label == label:
                return row
        raise KeyError(label)


@dataclass
class _Log:
    """What has been heard of one contender."""

    contender: Contender
    worker: Worker | None = None
    calls: list[dict[str, float]] = field(default_factory=list)
    matching: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    peak: int = 0
    device_peak: int | None = None
    failed: str | None = None
    features: Path | None = None

    def release(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def run(case: ThroughputCase, say: Callable[[str], None] = lambda text: None) -> Throughput:
    """Measure.

    Args:
        case: what.
        say: told what is being done, a line at a time.

    Raises:
        InputError: an image cannot be read, or the model or recipe does not fit.
        BackendError: nothing could be made ready. A contender that fails is a row that says so.
    """
    for path in case.images:
        load_image(path)
    threads = case.threads or available_cores()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="difftap-throughput-") as scratch:
        folder = Path(scratch)
        order = _order(case, threads, case.images or write_pictures(folder))
        say("making the model and its graphs ready")
        with Worker(threads) as worker:
            about = worker.ask("survey", **order, contender=asdict(case.contenders[0]))
        resident = _fits(case, about) if case.resident is None else case.resident
        logs = [_Log(contender) for contender in case.contenders]
        gemm: list[dict[str, float]] = []
        products = Worker(threads)
        try:
            for turn in range(case.rounds):
                gemm.append(products.ask("gemm", device=_device(case))["gemm"])
                for log in logs:
                    if log.failed is None:
                        say(f"round {turn + 1} of {case.rounds}: {log.contender.label}")
                        _take_turn(log, order, case, turn, folder)
                        if log.failed is not None:
                            say(f"{log.contender.label} is out: {log.failed}")
                        if not resident:
                            log.release()
        finally:
            products.close()
            for log in logs:
                log.release()
        rates = {kind: statistics.median(one[kind] for one in gemm) for kind in gemm[0]}
        return _result(case, logs, about, rates, {**_machine(case, threads, load), "resident": resident})


def _device(case: ThroughputCase) -> str:
    """Where most is at stake: the GPU if any contender runs there."""
    return "cuda" if any(one.device == "cuda" for one in case.contenders) else "cpu"


def _order(case: ThroughputCase, threads: int, images: Sequence[Path]) -> dict[str, Any]:
    return make_order(
        case.recipe,
        images,
        cache=case.cache,
        threads=threads,
        batch=case.batch,
    )


def _fits(case: ThroughputCase, about: Mapping[str, Any]) -> bool:
    """Whether all processes fit side by side, in half of what is free.

    Each takes thrice the weights and a gigabyte; of split weights OpenVINO keeps several copies more.
    """
    weights = sum(6 if contender.precision == "bf16x3" else 3 for contender in case.contenders)
    return bool(weights * about["weights"] + (len(case.contenders) << 30) < available_memory() // 2)


def _take_turn(log: _Log, order: dict[str, Any], case: ThroughputCase, turn: int, folder: Path) -> None:
    """One contender's turn; what goes wrong is written down and ends its part."""
    try:
        before = gpu_memory() if log.contender.device == "cuda" else None
        if log.worker is None:
            log.worker, opened, _ = open_contender({**order, "contender": asdict(log.contender)})
            log.about = log.about or opened
        path = folder / f"{log.contender.name}-{log.contender.precision}.npz"
        asked: dict[str, Any] = {"seconds": case.seconds, "matching": case.matching and turn == 0}
        if turn == 0:
            asked["features"] = str(path)
        told = log.worker.ask("round", **asked)
        log.features = path if turn == 0 else log.features
        log.calls += told["calls"]
        log.matching += told["matching"]
        log.peak = max(log.peak, told["peak"])
        if before is not None and turn == 0:
            log.device_peak = max(0, (gpu_memory() or before) - before)
    except DifftapError as error:
        log.failed = str(error)
        log.release()


def _result(
    case: ThroughputCase, logs: list[_Log], about: dict[str, Any], gemm: dict[str, float], conditions: dict[str, Any]
) -> Throughput:
    """Medians, ratios and fidelities from what was heard."""
    done = [log for log in logs if log.failed is None]
    rivals = [log for log in done if log.contender.rival and log.contender.precision == "fp32"]
    exact = [log for log in done if log.contender.precision == "fp32"]
    first = next(iter([*rivals, *exact, *done]), None)
    base = None
    for log in done:
        if log.contender.rival:
            base = call_timing(log.calls).median
            break
    wanted = _features(first) if first else {}
    rows = [
        ThroughputRow(log.contender, log.failed)
        if log.failed is not None
        else _row(case, log, about, gemm, base, wanted)
        for log in logs
    ]
    macs = {"vae": about["vae"], "unet": about["unet"]}
    conditions = {**conditions, "model": {"name": about["model"], "key": about["key"]}}
    if about["uncounted"]:
        conditions["uncounted"] = about["uncounted"]
    return Throughput(case, tuple(rows), first.contender.label if first else None, gemm, macs, conditions)


def _features(log: _Log) -> dict[str, Any]:
    if log.features is None:
        raise BackendError(f"{log.contender.label} gave no features")
    with np.load(log.features, allow_pickle=False) as stored:
        return dict(stored)


def _row(
    case: ThroughputCase,
    log: _Log,
    about: dict[str, Any],
    gemm: dict[str, float],
    base: float | None,
    wanted: dict[str, Any],
) -> ThroughputRow:
    timing, stages = call_timing(log.calls), stage_medians(log.calls)
    shares = [1.0 - (call["vae"] + call["unet"]) / call["total"] for call in log.calls]
    flop = _flop(case, log.contender, about)
    running = stages["vae"] + stages["unet"]
    rate = None if flop is None else flop / running
    got = _features(log)
    return ThroughputRow(
        log.contender,
        timing=timing,
        stages=stages,
        own_share=None if log.contender.rival else statistics.median(shares),
        matching=statistics.median(log.matching) if log.matching else None,
        rate=1.0 / timing.median,
        ratio=None if base is None else base / timing.median,
        flop=flop,
        flop_rate=rate,
        gemm_share=None if rate is None else rate / _fastest(gemm, log.contender.precision),
        peak=log.peak,
        device_peak=log.device_peak,
        open_seconds=log.about["open"],
        fidelity={name: TensorParity.of(got[name][None], wanted[name][None]) for name in wanted},
        about={name: log.about[name] for name in ("version", "device", "together", "notes")},
    )


def _flop(case: ThroughputCase, contender: Contender, about: dict[str, Any]) -> float | None:
    """Operations an image: DIFT's way encodes every member in every branch, all others once an image."""
    if about["vae"] is None:
        return None
    members = case.recipe.ensemble
    encodings = members * len(case.recipe.branches) if contender.name == "dift" else 1
    return float(2 * (encodings * about["vae"] + members * about["unet"]))


def _fastest(gemm: Mapping[str, float], precision: str) -> float:
    """Find the fastest product of a precision, or of fp32 where that was not measured."""
    same = [rate for kind, rate in gemm.items() if kind.endswith(precision)]
    return max(same or [rate for kind, rate in gemm.items() if kind.endswith("fp32")])


def _machine(case: ThroughputCase, threads: int, load: float) -> dict[str, Any]:
    from difftap.version import __version__

    conditions: dict[str, Any] = {
        "difftap": __version__,
        "cpu": cpu(),
        "cores": available_cores(),
        "threads": threads,
        "memory": available_memory(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rounds": case.rounds,
        "seconds": case.seconds,
        "batch": case.batch,
        "images": [str(path) for path in case.images] or "generated pictures, 500 x 375, JPEG",
        "warm_up": "each engine once (DIFT's way: both networks with one member; compiled: whole); quick ones a whole "
        "call more",
        "inside": "from image files to joined maps in memory; drawing the rivals' noise is not timed",
    }
    with contextlib.suppress(OSError):
        conditions["gpu"] = gpu()
    return conditions
