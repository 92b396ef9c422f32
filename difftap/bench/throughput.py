"""How many images a second: our backends in all their precisions against the ways people do it today, in one run.

Every contender has a process of its own. Rounds are interleaved: each round asks every contender in turn, so whatever
else the machine does falls on all of them. Processes stay alive between rounds where all fit into memory together; else
each is ended after its turn and started again for the next (A B A B). Before its first turn a process is warmed up. All
contenders get the same images and the same noise, and their features are compared in the same run.

`run` takes a `ThroughputCase` and gives a `Throughput`; `difftap.bench.throughput_report` makes text, JSON and
a picture.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difftap.bench.contenders import Contender
from difftap.bench.pictures import write_pictures
from difftap.bench.workers import Timing, Worker, call_timing, make_order, open_contender, stage_medians
from difftap.errors import BackendError, DifftapError, InputError
from difftap.export.parity import TensorParity
from difftap.images import load_image
from difftap.machine import available_cores, available_memory, cpu, gpu, gpu_memory
from difftap.recipe import Recipe

__all__ = ["OWN_STAGES", "Row", "Throughput", "ThroughputCase", "run"]

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
class Row:
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
    rows: tuple[Row, ...]
    reference: str | None
    gemm: Mapping[str, float]
    macs: Mapping[str, int | None]
    conditions: Mapping[str, Any]

    def row(self, label: str) -> Row:
        """The row of ``name:precision``.

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
        Row(log.contender, log.failed) if log.failed is not None else _row(case, log, about, gemm, base, wanted)
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
) -> Row:
    timing, stages = call_timing(log.calls), stage_medians(log.calls)
    shares = [1.0 - (call["vae"] + call["unet"]) / call["total"] for call in log.calls]
    flop = _flop(case, log.contender, about)
    running = stages["vae"] + stages["unet"]
    rate = None if flop is None else flop / running
    got = _features(log)
    return Row(
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
    """The fastest product of a precision, or of fp32 where that was not measured."""
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
