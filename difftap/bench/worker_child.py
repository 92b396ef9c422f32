"""The child process that measures: it reads orders and writes replies, one JSON object per line.

`difftap.bench.workers` is the other end. Its own process gives a contender its own peak memory and threads, a crash
ends only that contender, and a model's memory is free when its process ends. The orders are: survey the model, open a
contender, run a round with every stage timed, measure the rate of matrix products, measure the peak memory of a
function, and search with FAISS.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.bench.contenders import Contender
from difftap.bench.flops import count_graph
from difftap.bench.workers import hold_threads
from difftap.engine import Profile, default_cache_folder, featurizer, get_backend, model_key
from difftap.engine.noise import example_feeds
from difftap.errors import ArtifactError, DifftapError, MissingExtraError, first_line, require
from difftap.export.graphs import ensure_graph
from difftap.featuremap import FeatureMap
from difftap.images import load_image, to_input
from difftap.machine import peak_memory, resident_memory
from difftap.pipeline.conditioning import embed_prompts
from difftap.pipeline.environment import Runtime, check_fits, open_cache, open_checkpoint
from difftap.pipeline.pipeline import Pipeline
from difftap.recipe import Recipe

__all__ = ["ENGINE_STAGES", "TimedPipeline", "measure_gemm", "serve", "survey"]


ENGINE_STAGES = ("vae", "unet")
"""The stages that the runtime does; all other stages of a call are our own code."""


class TimedPipeline:
    """A pipeline whose stages are timed.

    The time of a runtime's stage is that of its own calls, inside `difftap.engine.Engine.compute`. It does not contain
    the checks of shapes and of finite values, decoding, resizing, drawing noise, copies or joining.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._clock: dict[str, float] = {}
        self._within = False
        self._undo: list[Callable[[], None]] = []
        for engine in pipeline.engines:
            # Two stages for every kind of network: what encodes an image once, and what is tapped (docs/throughput.md).
            stage = "vae" if engine.graph.component == pipeline.model.encoder else "unet"
            for name in ("_run", "_run_on_device"):
                self._time(engine, name, stage)
        # Replaced in the module that calls them; in the one that defines them, it would have no effect.
        self._time(featurizer, "to_input", "resize")
        self._time(featurizer, "draw_noise", "noise")
        self.together = max(engine.profile.ensemble for engine in pipeline.engines)

    def _time(self, owner: object, name: str, stage: str) -> None:
        """Replace a function of a module or an object by one that adds its time to a stage."""
        plain = getattr(owner, name)
        own = name in vars(owner)

        def timed(*args: object, **kwargs: object) -> object:
            if self._within:  # an engine call may contain another one, whose time must not be added twice
                return plain(*args, **kwargs)
            self._within = True
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._within = False
                self._clock[stage] = self._clock.get(stage, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, plain) if own else delattr(owner, name))

    def warm_up(self) -> None:
        """Run every engine once, on a full batch."""
        for engine in self._pipeline.engines:
            shapes = dataclasses.replace(engine.profile, batch=self._pipeline.batch)
            engine.run(example_feeds(engine.graph, shapes))

    def call(self, paths: Sequence[Path]) -> tuple[list[FeatureMap], dict[str, NDArray[np.float32]], dict[str, float]]:
        """Turn image files into joined maps, as every command does.

        Returns:
            the joined maps; the first image's map of every branch and tap, by ``branch.tap``; and the seconds of each
            stage: ``total``, ``decode``, ``resize``, ``noise``, ``vae``, ``unet``, ``join``, and ``rest`` (checks and
            copies).
        """
        self._clock = {}
        start = time.perf_counter()
        images = [load_image(path) for path in paths]
        decoded = time.perf_counter()
        features = list(self._pipeline.features(images))
        extracted = time.perf_counter()
        joined = [self._pipeline.join(one) for one in features]
        end = time.perf_counter()
        stages = {"decode": decoded - start, **self._clock, "join": end - extracted}
        rest = end - start - sum(stages.values())
        maps = {f"{i}.{tap}": one.data for i, taps in enumerate(features[0].branches) for tap, one in taps.items()}
        return joined, maps, {"total": end - start, **stages, "rest": rest}

    def close(self) -> None:
        """Restore the functions that were replaced, and close the engines."""
        for undo in reversed(self._undo):
            undo()
        self._pipeline.close()


def survey(recipe: Recipe, cache_folder: Path | None) -> JsonObject:
    """Export the graphs that are missing, and count their arithmetic.

    Returns:
        ``model`` and its ``key``; ``weights`` in bytes; multiply-adds of one encoding in ``vae``, and of one member in
        all branches in ``unet``. If they cannot be counted, both are None and ``uncounted`` gives the reason.
    """
    cache = open_cache(cache_folder)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    encoder = ensure_graph(cache, model, model.encoder) if model.encoder else None
    about: JsonObject = {
        "model": model.name,
        "key": model_key(cache, model),
        "weights": sum(p.stat().st_size for part in model.components for p in model.weight_files(part)),
        "vae": None,
        "unet": None,
        "uncounted": None,
    }
    networks = []
    for branch, prompt in zip(recipe.branches, embed_prompts(recipe, model, cache), strict=True):
        networks.append((ensure_graph(cache, model, model.tapped, branch.taps), Profile(recipe.size, 1, len(prompt))))
    try:
        about["vae"] = count_graph(encoder, Profile(recipe.size)) if encoder else 0
        about["unet"] = sum(count_graph(one, profile) for one, profile in networks)
    except (MissingExtraError, ArtifactError) as error:
        about["uncounted"] = str(error)
    return about


_TIMES = 6  # calls of which the fastest counts


def measure_gemm(side: int, device: str = "cpu") -> dict[str, float]:
    """Measure the operations per second of ``side`` x ``side`` matrix products, the best of several.

    A multiply-add counts as two operations. On the CPU, numpy's BLAS is measured; torch on the device, if installed.

    Returns:
        ``library precision`` -> operations per second.
    """
    rates: dict[str, float] = {}
    left, right = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    if device == "cpu":
        rates["numpy fp32"] = 2 * side**3 / _best(lambda: left @ right)
    try:
        torch = require("torch", "bench", "measuring torch's products")
    except MissingExtraError:
        return rates
    kinds = {"fp32": torch.float32}
    if device != "cpu":  # most CPUs multiply fp16 and bf16 slower than fp32, some much slower
        kinds |= {"fp16": torch.float16, "bf16": torch.bfloat16}
    for name, kind in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = False
        a, b = (torch.from_numpy(value).to(device, kind) for value in (left, right))

        def product(a: Any = a, b: Any = b) -> None:  # bound as defaults: the loop changes them
            with torch.inference_mode():
                a @ b
                if device == "cuda":
                    torch.cuda.synchronize()

        rates[f"torch {name}"] = 2 * side**3 / _best(product)
    return rates


def _best(call: Callable[[], object]) -> float:
    """Give the seconds of the fastest of several calls, after a warm-up."""
    call()
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


_MOST_CALLS = 200  # of a round, which bounds a reply's size
_QUICK = 1.0  # seconds; after a warm-up this short, a whole call is made too, since it will also be short
KEYPOINTS = 10  # points that are matched
GEMM_SIDE = 2048  # side of the matrices whose product is timed


class _Job:
    """The content of an order, as objects."""

    def __init__(self, data: JsonObject) -> None:
        self.contender = Contender(**data["contender"])
        self.recipe = Recipe.from_dict(data["recipe"])
        self.images = [Path(path) for path in data["images"]]
        self.cache = Path(data["cache"]) if data["cache"] else None
        self.runtime = Runtime(
            backend=self.contender.name,
            device=self.contender.device,
            threads=data["threads"],
            batch=data["batch"],
            cache=self.cache,
            precision=self.contender.precision,
        )

    @property
    def threads(self) -> int:
        return int(self.runtime.threads or 1)


class _OursRunner:
    """Run a backend of ours for the child."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        before = _artifacts(job.cache)  # to see whether opening had to build something
        self._pipeline = Pipeline.open(job.recipe, job.runtime)
        self.made = _artifacts(job.cache) != before
        self.batch = self._pipeline.batch
        self._ours = TimedPipeline(self._pipeline)
        self.about = {
            "version": self._pipeline.conditions["backend"]["version"],
            "device": self._pipeline.conditions["backend"]["device"],
            "together": self._ours.together,
            "notes": [],
        }

    def warm_up(self) -> None:
        self._ours.warm_up()

    def call(self, paths: list[Path]) -> tuple[list[FeatureMap], dict[str, NDArray[np.float32]], dict[str, float]]:
        return self._ours.call(paths)

    def match(self, source: FeatureMap, target: FeatureMap, points: NDArray[np.int64]) -> None:
        from difftap.matching import match_points

        match_points(source, target, points, self._job.recipe.matcher, confidence=False)


class _RivalRunner:
    """Run a rival for the child."""

    def __init__(self, job: _Job) -> None:
        from difftap.bench.rivals import Rival
        from difftap.pipeline.conditioning import embed_prompts
        from difftap.pipeline.environment import open_cache, open_checkpoint

        self._job = job
        cache = open_cache(job.cache)
        self._model = open_checkpoint(job.recipe.model, cache, job.recipe.size)
        prompts = embed_prompts(job.recipe, self._model, cache)
        self._tuned = job.contender.name == "dift-tuned"
        device, precision = job.contender.device, job.contender.precision
        self._rival = Rival(self._model, job.recipe, prompts, device, precision, tuned=self._tuned)
        self.made = False
        self.batch = 1 if device == "cpu" else job.runtime.batch
        version = get_backend("torch").version()
        self.about = {
            "version": version,
            "device": device,
            "together": self._rival.together,
            "notes": self._rival.notes,
        }

    def warm_up(self) -> None:
        self._rival.warm_up(self.batch)

    def call(self, paths: list[Path]) -> tuple[list[FeatureMap], dict[str, NDArray[np.float32]], dict[str, float]]:
        from difftap.engine.noise import draw_noise

        # Before the clock starts: the rival gets our noise, and drawing it is not part of its way.
        recipe = self._job.recipe
        latent = self._rival.rule.latent_shape(recipe.size)
        noises = draw_noise(recipe, [load_image(path).digest for path in paths], latent, recipe.ensemble)
        start = time.perf_counter()
        images = [load_image(path) for path in paths]
        decoded = time.perf_counter()
        laid = [to_input(image, recipe.size, recipe.fit, recipe.resize) for image in images]
        resized = time.perf_counter()
        values, clock = self._rival.extract(np.stack([pixels for pixels, _ in laid]), noises)
        end = time.perf_counter()
        stages = {"decode": decoded - start, "resize": resized - decoded, **clock}
        maps = {f"{i}.{tap}": value[0] for i, taps in enumerate(values) for tap, value in taps.items()}
        first = next(iter(values[0].values()))
        joined = [FeatureMap(np.ascontiguousarray(first[i]), laid[i][1]) for i in range(len(laid))]
        return joined, maps, {"total": end - start, **stages, "rest": end - start - sum(stages.values())}

    def match(self, source: FeatureMap, target: FeatureMap, points: NDArray[np.int64]) -> None:
        from difftap.bench.rivals import slow_way

        slow_way(source, target, points, self._job.recipe.matcher.interpolation, self._tuned)


def _artifacts(cache: Path | None) -> dict[Path, int]:
    folder = cache or default_cache_folder()
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}


class _Child:
    """The orders: one method each. ``open`` must come before ``round``."""

    _runner: _OursRunner | _RivalRunner

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._turn = itertools.count()

    def survey(self, order: JsonObject) -> JsonObject:
        """Prepare model, graphs and prompts, and count the arithmetic of one image."""
        job = _Job(order)
        return survey(job.recipe, job.cache)

    def open(self, order: JsonObject) -> JsonObject:
        """Open the contender and warm it up."""
        self._job = job = _Job(order)
        start = time.perf_counter()
        self._runner = (_RivalRunner if job.contender.rival else _OursRunner)(job)
        opened = time.perf_counter()
        if self._runner.made and not order.get("keep"):
            return {"made": True}  # the parent starts a new process, whose peak memory contains no build
        self._runner.warm_up()
        warmed = time.perf_counter()
        if warmed - opened < _QUICK:
            self._runner.call(self._paths(0))
        return {"made": False, "open": opened - start, "warm_up": warmed - opened, **self._runner.about}

    def _paths(self, turn: int) -> list[Path]:
        assert self._job is not None  # noqa: S101 - open comes first
        files = self._job.images
        return [files[(turn * self._runner.batch + k) % len(files)] for k in range(self._runner.batch)]

    def round(self, order: JsonObject) -> JsonObject:
        """Make calls for the seconds that are ordered, at least one; if ordered, save the features of the first."""
        assert self._job is not None  # noqa: S101 - open comes first
        calls: list[dict[str, float]] = []
        matching: list[float] = []
        joined: list[FeatureMap] = []
        began = time.perf_counter()
        while len(calls) < _MOST_CALLS and (not calls or time.perf_counter() - began < order["seconds"]):
            made, maps, stages = self._runner.call(self._paths(next(self._turn)))
            if not calls and order.get("features"):
                named: Mapping[str, Any] = maps
                with open(order["features"], "wb") as handle:
                    np.savez(handle, **named)
            joined = (joined + made)[-2:]  # matching needs two maps; keeping more would raise the peak memory
            calls.append({"images": len(made), **stages})
        peak = peak_memory()  # before matching, which is measured by itself
        if order["matching"]:
            matching = [self._match(joined[0], joined[-1]) for _ in range(1 if self._job.contender.rival else 3)]
        return {"calls": calls, "matching": matching, "peak": peak}

    def _match(self, source: FeatureMap, target: FeatureMap) -> float:
        points = np.random.default_rng(0).integers(0, source.image_size, (KEYPOINTS, 2)).astype(np.int64)
        start = time.perf_counter()
        self._runner.match(source, target, points)
        return time.perf_counter() - start

    def gemm(self, order: JsonObject) -> JsonObject:
        """Measure the rates of square matrix products (`measure_gemm`)."""
        return {"gemm": measure_gemm(GEMM_SIDE, order["device"])}

    def faiss(self, order: JsonObject) -> JsonObject:
        """Search with FAISS and with numpy on a device."""
        from difftap.bench.gpucheck import search_faiss

        return search_faiss(order["device"]).to_dict()

    def peak(self, order: JsonObject) -> JsonObject:
        """Measure by how many bytes one call grows this process; what the call needs is prepared before."""
        module, _, name = order["place"].partition(":")
        call = getattr(importlib.import_module(module), name)(**order["arguments"])
        before = resident_memory()
        call()
        return {"peak": max(0, peak_memory() - before)}


def serve(orders: TextIO, replies: TextIO) -> None:
    """Carry out orders until there are no more; an error is a reply too."""
    child = _Child()
    actions: dict[str, Callable[[JsonObject], JsonObject]] = {
        "survey": child.survey,
        "open": child.open,
        "round": child.round,
        "gemm": child.gemm,
        "peak": child.peak,
        "faiss": child.faiss,
    }
    for order in _lines(orders):
        try:
            with hold_threads(order["threads"]):
                reply = actions[order["do"]](order)
        except DifftapError as error:
            reply = {"error": str(error)}
        except MemoryError:
            reply = {"error": "out of memory"}
        except Exception as error:  # any error of another package: this contender fails, the others continue
            reply = {"error": f"{type(error).__name__}: {first_line(error)}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _lines(orders: TextIO) -> Iterator[JsonObject]:
    while line := orders.readline():
        yield json.loads(line)


def _main() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only: be killed when the parent ends, even in a call
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stdout becomes stderr, so that what libraries print is not read as a reply
    serve(sys.stdin, replies)


if __name__ == "__main__":
    _main()
