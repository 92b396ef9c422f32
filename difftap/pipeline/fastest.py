"""``--backend auto``: measure once which backend is fastest here, and remember it.

The recipe's own engines are measured (the VAE and every branch's UNet, at the recipe's resolution): each is warmed up
and run a few times, one backend after the other. The cache keeps the choice for the same engines on the same machine;
it is measured again when the processor, the GPU, a runtime's version or difftap changes. All backends are measured in
one precision, fp32 unless another is asked for: at fp32 they give the same features within rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import cache as memoise
from importlib import metadata

from difftap.artifacts.files import JsonObject, write_atomic
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import (
    BACKENDS,
    Backend,
    Cache,
    choose_device,
    get_backend,
    model_key,
)
from difftap.engine.builds import known_engine
from difftap.engine.noise import example_feeds
from difftap.errors import ArtifactError, BackendError, DifftapError, OutputError
from difftap.machine import available_cores, cpu, gpu
from difftap.pipeline.conditioning import embed_prompts
from difftap.pipeline.environment import Environment, RecipeEngines, Runtime, check_fits, open_cache, open_checkpoint
from difftap.recipe import Recipe
from difftap.version import __version__

__all__ = ["AUTO", "Choice", "Trial", "choose", "forget_choices", "open_environment", "resolve", "stored_choices"]

AUTO = "auto"
_LOG = logging.getLogger("difftap")
_FILE = "choices.json"
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch", "diffusers")
"""Distributions whose change makes a choice stale."""
_RUNS = 3  # most timed runs of an engine, after one to warm up
_ENOUGH = 1.0  # seconds of timed runs after which no further run is started


@dataclass(frozen=True)
class Trial:
    """The result of one backend.

    Attributes:
        backend: its name.
        device: the device that it ran on; empty if it was left out.
        seconds: time per image, for the VAE and all members of all branches; None if it was not measured.
        reason: why it was not measured.
    """

    backend: str
    device: str = ""
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen backend, and why it was chosen.

    Attributes:
        backend: name of the fastest backend.
        device: its device.
        about: what was measured: model, size, ensemble, taps, precision, device asked for, threads, batch.
        trials: the results of all backends.
        stamp: what the choice depends on besides: processor, GPU, versions.
    """

    backend: str
    device: str
    about: JsonObject
    trials: tuple[Trial, ...]
    stamp: JsonObject

    @property
    def why(self) -> str:
        """The reason for the choice, on one line."""
        timed = sorted((t for t in self.trials if t.seconds is not None), key=lambda t: t.seconds or 0.0)
        if not timed:
            return f"{self.backend} on {self.device}: no other backend can be measured here"
        figures = ", ".join(f"{one.backend} on {one.device} {one.seconds:.3g} s" for one in timed)
        return f"{self.backend} on {self.device} is the fastest here; measured for an image: {figures}"


def resolve(recipe: Recipe, runtime: Runtime) -> Runtime:
    """Replace the backend ``auto`` by the fastest one here; leave any other runtime as it is.

    Raises:
        DifftapError: as `choose`.
    """
    if runtime.backend != AUTO:
        return runtime
    choice = choose(recipe, runtime)
    return replace(runtime, backend=choice.backend, device=choice.device)


def open_environment(recipe: Recipe, runtime: Runtime, *, to_run: bool = True) -> Environment:
    """Choose where a recipe runs, like `Environment.open`, but also for the backend ``auto``."""
    return Environment.open(recipe, resolve(recipe, runtime), to_run=to_run)


def choose(
    recipe: Recipe,
    runtime: Runtime,
    *,
    afresh: bool = False,
) -> Choice:
    """Give the remembered choice if it still holds; else measure.

    Args:
        recipe: what is to be run.
        runtime: device, threads, batch, precision and cache.
        afresh: measure even if a choice is remembered.

    Raises:
        InputError: the model or the recipe does not fit.
        BackendError: no backend can run this here.
    """
    cache = open_cache(runtime.cache)
    model = open_checkpoint(recipe.model, cache, recipe.size)
    check_fits(recipe, model)
    about = _about(recipe, runtime, model, cache)
    stamp = _stamp()
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    known = _load(cache).get(key)
    if known is not None and known.stamp == stamp and not afresh:
        _LOG.debug("backend auto: %s (remembered)", known.why)
        return known
    choice = _measure(recipe, runtime, model, cache, about, stamp)
    _LOG.info("backend auto: %s", choice.why)
    _save(cache, key, choice)
    return choice


def stored_choices(cache: Cache) -> list[tuple[Choice, bool]]:
    """List the remembered choices, and tell of each whether it still holds on this machine."""
    stamp = _stamp()
    return [(choice, choice.stamp == stamp) for choice in _load(cache).values()]


def forget_choices(cache: Cache) -> None:
    """Remove all remembered choices."""
    (cache.folder / _FILE).unlink(missing_ok=True)


def _about(recipe: Recipe, runtime: Runtime, model: Checkpoint, cache: Cache) -> JsonObject:
    """Give what decides the speed: choices are remembered under its hash."""
    return {
        "model": model.name,
        "model_key": model_key(cache, model),
        "size": list(recipe.size),
        "ensemble": recipe.ensemble,
        "branches": [
            [*branch.taps, len(prompt)]
            for branch, prompt in zip(recipe.branches, embed_prompts(recipe, model, cache), strict=True)
        ],
        "precision": runtime.precision,
        "device": runtime.device,
        "threads": runtime.threads or available_cores(),
        "batch": runtime.batch,
    }


@memoise
def _stamp() -> JsonObject:
    """Give what a remembered choice depends on: processor, GPU and versions."""
    # Read from the installed packages' metadata, because importing the runtimes would take seconds.
    versions = {}
    for name in _RUNTIMES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"difftap": __version__, "backends": list(BACKENDS), "cpu": cpu(), "gpu": gpu(), "versions": versions}


def _measure(
    recipe: Recipe,
    runtime: Runtime,
    model: Checkpoint,
    cache: Cache,
    about: JsonObject,
    stamp: JsonObject,
) -> Choice:
    """Measure every backend that can run this recipe here.

    Raises:
        BackendError: none can, or none could be measured.
    """
    trials: list[Trial] = []
    able: list[tuple[Backend, str]] = []
    for backend in sorted(map(get_backend, BACKENDS), key=lambda one: not one.needs_graph):
        name = backend.name
        if not backend.needs_graph and able and gpu() is None:
            # Backends that need graphs come first, so this is torch, which would only be asked for its devices:
            # importing it for that takes seconds.
            trials.append(Trial(name, reason=_no_graph(able[0][0], "cpu")))
            continue
        try:
            device = choose_device(backend, runtime.device)
        except BackendError as error:
            trials.append(Trial(name, reason=str(error)))
            continue
        hindrance = backend.cannot_run(device)
        if hindrance:
            trials.append(Trial(name, reason=hindrance))
            continue
        if runtime.precision not in backend.precisions(device):
            trials.append(Trial(name, reason=f"has no precision {runtime.precision} on {device}"))
            continue
        able.append((backend, device))
    if not able:
        raise BackendError(
            f"no backend here has precision {runtime.precision} on device {runtime.device}: "
            + "; ".join(f"{one.backend}: {one.reason}" for one in trials)
        )
    left_out = {backend.name: _left_out(backend, device, able) for backend, device in able}
    trials += [Trial(name, reason=reason) for name, reason in left_out.items() if reason]
    rest = [(backend, device) for backend, device in able if not left_out[backend.name]]
    if len(rest) == 1:
        backend, device = rest[0]
        return Choice(backend.name, device, about, (*trials, Trial(backend.name, device)), stamp)
    _LOG.info("backend auto: measuring %s once for this recipe", ", ".join(backend.name for backend, _ in rest))
    for backend, device in rest:
        try:
            trials.append(_try(recipe, runtime, model, cache, backend, device))
        except DifftapError as error:
            trials.append(Trial(backend.name, device, reason=str(error)))
    timed = [(trial.seconds, trial) for trial in trials if trial.seconds is not None]
    if not timed:
        reasons = "; ".join(f"{trial.backend}: {trial.reason}" for trial in trials)
        raise BackendError(f"no backend could be measured for '{model.name}': {reasons}; name one by --backend")
    best = min(timed, key=lambda pair: pair[0])[1]
    return Choice(best.backend, best.device, about, tuple(trials), stamp)


def _left_out(backend: Backend, device: str, able: list[tuple[Backend, str]]) -> str | None:
    """Give the reason why a backend that could run is not worth measuring; None if it is worth it."""
    if device == "cpu" and any(other != "cpu" for _, other in able):
        return "has only the CPU, and another backend has a GPU"
    graphs = [one for one, where in able if one.needs_graph and where == device]
    if not backend.needs_graph and graphs:
        return _no_graph(graphs[0], device)
    return None


def _no_graph(other: Backend, device: str) -> str:
    return f"runs the checkpoint itself; {other.name} runs its graph on {device}"


def _try(recipe: Recipe, runtime: Runtime, model: Checkpoint, cache: Cache, backend: Backend, device: str) -> Trial:
    """Measure the seconds per image on one backend. Engines that must first be built are not measured."""
    threads = runtime.threads or available_cores()
    at = Environment(cache, model, backend, device, threads, runtime.precision)
    total = 0.0
    for component, taps, profile in RecipeEngines(at, recipe, runtime.batch).plan():
        graph = at.graph(component, taps, profile)
        built = None
        if backend.builds(profile, device):
            command = f"difftap engines build --backend {backend.name} --precision {profile.precision}"
            # Building takes minutes, which nobody expects of a choice: the reason says how to do it.
            try:
                built = known_engine(cache, graph, backend, profile, device)
            except ArtifactError as error:
                return Trial(backend.name, device, reason=f"{error}; {command}")
            if built is None:
                return Trial(backend.name, device, reason=f"its engines are not built; {command}")
        with at.open_engine(graph, profile, built) as engine:
            if engine.device != device:
                return Trial(backend.name, device, reason=f"falls back to {engine.device}")
            feeds = example_feeds(graph, profile)
            engine.run(feeds)
            seconds: list[float] = []
            while len(seconds) < _RUNS and sum(seconds) < _ENOUGH:
                start = time.perf_counter()
                engine.run(feeds)
                seconds.append(time.perf_counter() - start)
            runs = 1 if component == model.encoder else recipe.ensemble // profile.ensemble
            total += runs * min(seconds) / profile.batch  # the fastest run is least disturbed by other programs
    return Trial(backend.name, device, total)


def _load(cache: Cache) -> dict[str, Choice]:
    """Load the remembered choices by their keys; none if the file is missing or cannot be read."""
    try:
        data = json.loads((cache.folder / _FILE).read_text(encoding="utf-8"))
        return {
            key: Choice(**{**one, "trials": tuple(Trial(**trial) for trial in one["trials"])})
            for key, one in data.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(cache: Cache, key: str, choice: Choice) -> None:
    try:
        with cache.lock(cache.folder / _FILE):  # another process may be adding a choice of its own
            known = {**_load(cache), key: choice}
            text = json.dumps({name: asdict(one) for name, one in known.items()}, indent=1) + "\n"
            write_atomic(cache.folder / _FILE, text)
    except OutputError as error:  # without the file, the next run just measures again
        _LOG.warning("the choice cannot be remembered: %s", error)
