"""The child process that measures: orders in, replies out, one JSON a line (`difftap.bench.workers` is the other end).

A process of its own gives a contender its own peak memory and threads; one that dies takes nobody along, and several
full-size models are in memory at once only where they fit. What it can be told: look at what must be there, open a
contender, run rounds with a clock in our own stages, measure the rate of matrix products, the peak memory of a
function, and a search with FAISS.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from difftap.bench.contenders import Contender
from difftap.bench.flops import count_graph
from difftap.bench.workers import hold_threads
from difftap.engine import Profile, default_cache_folder, featurizer, get_backend, model_key
from difftap.engine.noise import example_feeds
from difftap.errors import ArtefactError, DifftapError, MissingExtraError, first_line, require
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

"""What the runtime does; everything else in a call is our own."""


class TimedPipeline:
    """A pipeline, ready and clocked.

    The runtimes' own calls are timed where they are made, inside `difftap.engine.Engine.compute`: its checks of shapes
    are outside, and so are the look for values that are not finite, decoding, resizing, drawing noise, copies, joining.
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
        self._time(featurizer, "to_input", "resize")
        self._time(featurizer, "draw_noise", "noise")
        self.together = max(engine.profile.ensemble for engine in pipeline.engines)

    def _time(self, owner: Any, name: str, stage: str) -> None:
        plain = getattr(owner, name)
        own = name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._within:  # one engine call may be made of another
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

    def call(self, paths: Sequence[Path]) -> tuple[list[FeatureMap], dict[str, np.ndarray[Any, Any]], dict[str, float]]:
        """Files to joined maps, as every command does it.

        Returns:
            The joined maps; the first image's map of every branch and tap by ``branch.tap``; and seconds by stage:
            ``total``, ``decode``, ``resize``, ``noise``, ``vae``, ``unet``, ``join``, and ``rest`` (checks and copies).
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
        """Take the clock out and close the engines."""
        for undo in reversed(self._undo):
            undo()
        self._pipeline.close()


def survey(recipe: Recipe, cache_folder: Path | None) -> dict[str, Any]:
    """Export what is missing, and count.

    Returns:
        ``model`` and its ``key``, ``weights`` in bytes, and multiply-adds: ``vae`` of one
        encoding, ``unet`` of one member in all branches; both None with the reason in ``uncounted`` where they cannot
        be counted.
    """
    cache = open_cache(cache_folder)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    encoder = ensure_graph(cache, model, model.encoder) if model.encoder else None
    about: dict[str, Any] = {
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
    except (MissingExtraError, ArtefactError) as error:
        about["uncounted"] = str(error)
    return about


_TIMES = 6


def measure_gemm(side: int, device: str = "cpu") -> dict[str, float]:
    """Operations a second of ``side`` x ``side`` products, the best of several, by ``library precision``.

    A multiply-add is two operations. numpy's BLAS on the CPU, and torch's on the device where torch is installed.
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
    if device != "cpu":  # most processors multiply halves slower than fp32, some by far
        kinds |= {"fp16": torch.float16, "bf16": torch.bfloat16}
    for name, kind in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = False
        a, b = (torch.from_numpy(value).to(device, kind) for value in (left, right))

        def product(a: Any = a, b: Any = b) -> None:
            with torch.inference_mode():
                a @ b
                if device == "cuda":
                    torch.cuda.synchronize()

        rates[f"torch {name}"] = 2 * side**3 / _best(product)
    return rates


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, the first left out."""
    call()
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


_MOST_CALLS = 200

_QUICK = 1.0  # seconds: a warm-up this short is followed by a whole call, which then is quick too

KEYPOINTS = 10

GEMM_SIDE = 2048


class _Job:
    """What an order says, read once."""

    def __init__(self, data: dict[str, Any]) -> None:
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
    """A backend of ours behind the child's orders."""

    def __init__(self, job: _Job) -> None:
        from difftap.bench.worker_child import TimedPipeline

        self._job = job
        before = _artefacts(job.cache)
        self._pipeline = Pipeline.open(job.recipe, job.runtime)
        self.made = _artefacts(job.cache) != before
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

    def call(self, paths: list[Path]) -> tuple[list[FeatureMap], dict[str, Any], dict[str, float]]:
        return self._ours.call(paths)

    def match(self, source: FeatureMap, target: FeatureMap, points: np.ndarray[Any, Any]) -> None:
        from difftap.matching import match_points

        match_points(source, target, points, self._job.recipe.matcher, confidence=False)


class _RivalRunner:
    """A rival behind the child's orders."""

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

    def call(self, paths: list[Path]) -> tuple[list[FeatureMap], dict[str, Any], dict[str, float]]:
        from difftap.engine.noise import draw_noise

        recipe = self._job.recipe
        latent = self._rival.rule.latent_shape(recipe.size)
        noises = draw_noise(recipe, [load_image(path).digest for path in paths], latent, recipe.ensemble)
        start = time.perf_counter()
        images = [load_image(path) for path in paths]
        decoded = time.perf_counter()
        laid = [to_input(image, recipe.size, recipe.fit) for image in images]
        resized = time.perf_counter()
        values, clock = self._rival.extract(np.stack([pixels for pixels, _ in laid]), noises)
        end = time.perf_counter()
        stages = {"decode": decoded - start, "resize": resized - decoded, **clock}
        maps = {f"{i}.{tap}": value[0] for i, taps in enumerate(values) for tap, value in taps.items()}
        first = next(iter(values[0].values()))
        joined = [FeatureMap(np.ascontiguousarray(first[i]), laid[i][1]) for i in range(len(laid))]
        return joined, maps, {"total": end - start, **stages, "rest": end - start - sum(stages.values())}

    def match(self, source: FeatureMap, target: FeatureMap, points: np.ndarray[Any, Any]) -> None:
        from difftap.bench.rivals import slow_way

        slow_way(source, target, points, self._job.recipe.matcher.interpolation, self._tuned)


def _artefacts(cache: Path | None) -> dict[Path, int]:
    folder = cache or default_cache_folder()
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}


class _Child:
    """The orders: ``survey``, ``open``, ``round``, ``gemm``, ``peak``."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._job: _Job | None = None
        self._turn = itertools.count()

    def survey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make model, graphs and prompts ready, and count the arithmetic of one image."""
        from difftap.bench.worker_child import survey

        job = _Job(order)
        return survey(job.recipe, job.cache)

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Open the contender and warm it up."""
        self._job = job = _Job(order)
        start = time.perf_counter()
        self._runner = (_RivalRunner if job.contender.rival else _OursRunner)(job)
        opened = time.perf_counter()
        if self._runner.made and not order.get("keep"):
            return {"made": True}  # a fresh process is asked again, whose memory no build has touched
        self._runner.warm_up()
        warmed = time.perf_counter()
        if warmed - opened < _QUICK:
            self._runner.call(self._paths(0))
        return {"made": False, "open": opened - start, "warm_up": warmed - opened, **self._runner.about}

    def _paths(self, turn: int) -> list[Path]:
        assert self._job is not None  # noqa: S101 - open comes first
        files = self._job.images
        return [files[(turn * self._runner.batch + k) % len(files)] for k in range(self._runner.batch)]

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        """Call for as long as is asked, at least once; the first round's first call also gives its features."""
        assert self._job is not None  # noqa: S101 - open comes first
        calls: list[dict[str, float]] = []
        matching: list[float] = []
        joined: list[FeatureMap] = []
        began = time.perf_counter()
        while len(calls) < _MOST_CALLS and (not calls or time.perf_counter() - began < order["seconds"]):
            made, maps, stages = self._runner.call(self._paths(next(self._turn)))
            if not calls and order.get("features"):
                with open(order["features"], "wb") as handle:
                    np.savez(handle, **maps)
            joined = (joined + made)[-2:]
            calls.append({"images": len(made), **stages})
        peak = peak_memory()
        if order["matching"]:
            matching = [self._match(joined[0], joined[-1]) for _ in range(1 if self._job.contender.rival else 3)]
        return {"calls": calls, "matching": matching, "peak": peak}

    def _match(self, source: FeatureMap, target: FeatureMap) -> float:
        points = np.random.default_rng(0).integers(0, source.image_size, (KEYPOINTS, 2)).astype(np.int64)
        start = time.perf_counter()
        self._runner.match(source, target, points)
        return time.perf_counter() - start

    def gemm(self, order: dict[str, Any]) -> dict[str, Any]:
        """Multiply-add rates of square products, operations a second (two a multiply-add), best of several."""
        from difftap.bench.worker_child import measure_gemm

        return {"gemm": measure_gemm(GEMM_SIDE, order["device"])}

    def faiss(self, order: dict[str, Any]) -> dict[str, Any]:
        """Search with FAISS and with numpy on a device."""
        from difftap.bench.gpucheck import search_faiss

        return search_faiss(order["device"]).to_dict()

    def peak(self, order: dict[str, Any]) -> dict[str, Any]:
        """Measure by how many bytes one call grows this process; what the call needs is made before."""
        module, _, name = order["place"].partition(":")
        call = getattr(importlib.import_module(module), name)(**order["arguments"])
        before = resident_memory()
        call()
        return {"peak": max(0, peak_memory() - before)}


def serve(orders: TextIO, replies: TextIO) -> None:
    """Carry out orders until there are no more; what goes wrong is a reply too."""
    child = _Child()
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
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
        except Exception as error:  # another package's, of any kind: this contender is out, the others go on
            reply = {"error": f"{type(error).__name__}: {first_line(error)}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _lines(orders: TextIO) -> Iterator[dict[str, Any]]:
    while line := orders.readline():
        yield json.loads(line)


def _main() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the parent, even in the middle of a call
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    serve(sys.stdin, replies)


if __name__ == "__main__":
    _main()
