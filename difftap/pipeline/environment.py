"""The one way to open: where a recipe runs (cache, checkpoint, backend, device), and its engines made there.

Pipelines, ``difftap engines build`` and every command that needs a checkpoint or an engine come through here, so an
engine is the same whoever asked for it first: its graph exported, its files built on calibrated feeds, and held against
the float32 reference.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.cache import Cache, default_cache_folder
from difftap.artifacts.files import JsonObject, output_errors
from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Size
from difftap.engine import (
    Backend,
    Engine,
    Graph,
    Profile,
    check_precision,
    choose_device,
    get_backend,
    members_per_run,
    model_key,
)
from difftap.engine.backend import CALIBRATED, Array
from difftap.engine.builds import ensure_built
from difftap.engine.calibration import RecipeCalibration, bundled_images
from difftap.engine.noise import example_feeds
from difftap.errors import BackendError, InputError
from difftap.export.parity import TensorParity, measure
from difftap.images import PICTURE_ENDINGS, Image, find_pictures, load_image
from difftap.machine import available_cores
from difftap.pipeline.conditioning import embed_prompts
from difftap.recipe import ModelReference, Recipe
from difftap.version import __version__

__all__ = [
    "Environment",
    "RecipeEngines",
    "Runtime",
    "calibration_images",
    "check_fits",
    "fidelity_feeds",
    "open_cache",
    "open_checkpoint",
    "prepare_graph",
    "report_of",
    "run_members",
]

_LOG = logging.getLogger("difftap")
_PROBE = "probe.npz"


@dataclass(frozen=True)
class Runtime:
    """Where and how engines run; at fp32, nothing here changes the features beyond rounding.

    Attributes:
        backend: name of a backend, or ``auto`` for the one that is fastest here (`difftap.pipeline.fastest`).
        device: ``auto``, or one of the backend's, such as ``cpu`` or ``cuda``.
        threads: CPU threads; None for all that the process may use.
        batch: images per engine run on a GPU; a CPU takes one at a time.
        cache: the cache folder; None for the default one.
        precision: what engines compute in; all but fp32 change the features a little, by what their manifests say.
        calibrate: pictures, and folders of them, for precisions that are calibrated; none for the bundled ones.
    """

    backend: str = "ort"
    device: str = "auto"
    threads: int | None = None
    batch: int = 1
    cache: Path | None = None
    precision: str = "fp32"
    calibrate: tuple[Path, ...] = ()


def open_cache(folder: Path | None = None) -> Cache:
    """Open a cache folder, or the default one; nothing is made before something is written to it."""
    return Cache(folder or default_cache_folder())


def open_checkpoint(reference: ModelReference, cache: Cache, size: Size | None = None) -> Checkpoint:
    """Find, build or download a checkpoint.

    Args:
        reference: which.
        cache: where what is built or put together is kept.
        size: the input that is wanted, ``(W, H)`` in pixels: refused before anything is built, if it cannot fit.

    Raises:
        ModelError: there is no such model, or it cannot be had.
        RecipeError: the size does not fit it.
    """
    from difftap.backbones.find import open_model

    return open_model(reference, cache, size=size)


def check_fits(recipe: Recipe, model: Checkpoint) -> None:
    """Make sure, before anything slow starts, that a model can do what a recipe asks.

    Raises:
        RecipeError: the size, a tap or a timestep does not fit the model.
        ModelError: its noise schedule is of an unknown kind.
    """
    model.check(recipe)


def calibration_images(paths: tuple[Path, ...]) -> list[Image]:
    """Load the pictures that are named, of a folder all below it by their paths; the bundled ones for none.

    Raises:
        ImageError: a file is no picture that can be read.
        InputError: a folder holds no picture.
    """
    if not paths:
        return bundled_images()
    files: list[Path] = []
    for path in paths:
        found = find_pictures(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no pictures in '{path}' to calibrate on; allowed: {', '.join(PICTURE_ENDINGS)}")
        files += found
    return [load_image(path) for path in files]


def prepare_graph(
    cache: Cache,
    backend: Backend,
    model: Checkpoint,
    component: str,
    taps: tuple[str, ...],
    profile: Profile,
    device: str,
) -> Graph:
    """Give the graph a backend opens for a profile: exported and trusted, in the types that the backend wants.

    For a backend that runs the checkpoint itself it is just named.
    """
    if not backend.needs_graph:
        return Graph(model, component, taps)
    from difftap.export.graphs import ensure_graph

    graph = ensure_graph(cache, model, component, taps)
    wanted = backend.graph_precision(profile, device)
    if wanted == "fp32":
        return graph
    from difftap.export.variants import ensure_variant

    kind, _, attention = wanted.partition("-")
    return ensure_variant(cache, graph, kind, attention or "softmax")


def run_members(backend: Backend, device: str, model: Checkpoint, recipe: Recipe) -> int:
    """How many ensemble members one run of a backend takes."""
    if backend.fused_attention(device):
        return recipe.ensemble
    return members_per_run(model, recipe.size, recipe.ensemble)


def fidelity_feeds(built: Path | None, graph: Graph, profile: Profile) -> Mapping[str, Array]:
    """Give what an engine is held against its reference on: real feeds kept when it was built, else seeded ones."""
    probe = built / _PROBE if built else None
    if probe is None or not probe.is_file():
        return example_feeds(graph, profile)
    with np.load(probe) as arrays:
        return {name: arrays[name] for name in arrays.files}


@dataclass(frozen=True)
class Environment:
    """Where networks run: everything of a runtime decided, and the checkpoint found.

    Attributes:
        cache: where artifacts are kept.
        model: the checkpoint.
        backend: the runtime.
        device: one of its devices.
        threads: CPU threads.
        precision: what engines compute in.
    """

    cache: Cache
    model: Checkpoint
    backend: Backend
    device: str
    threads: int
    precision: str = "fp32"

    @classmethod
    def open(cls, recipe: Recipe, runtime: Runtime, *, to_run: bool = True) -> Environment:
        """Decide where a recipe runs, and find its checkpoint.

        Args:
            recipe: names the checkpoint, and must fit it.
            runtime: with a named backend; `difftap.pipeline.fastest.open_environment` takes ``auto`` too.
            to_run: refuse a precision that the backend has not, and a backend that can build here but not run.

        Raises:
            InputError: the model, a tap, the size or the backend does not exist or does not fit.
            BackendError: the backend cannot be used here.
        """
        cache = open_cache(runtime.cache)
        backend = get_backend(runtime.backend)
        device = choose_device(backend, runtime.device)
        if to_run:
            check_precision(backend, device, runtime.precision)
            hindrance = backend.cannot_run(device)
            if hindrance:
                raise BackendError(hindrance)
        model = open_checkpoint(recipe.model, cache, recipe.size)
        check_fits(recipe, model)
        return cls(cache, model, backend, device, runtime.threads or available_cores(), runtime.precision)

    def conditions(self, recipe: Recipe) -> JsonObject:
        """Give the conditions that go with every number: recipe, model, backend, precision, versions, machine."""
        return {
            "difftap": __version__,
            "recipe": recipe.to_dict(),
            "recipe_key": recipe.key(),
            "model": {"name": self.model.name, "key": model_key(self.cache, self.model)},
            "backend": {
                "name": self.backend.name,
                "version": self.backend.version(),
                "device": self.device,
                "precision": self.precision,
                "threads": self.threads,
            },
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "machine": platform.machine(),
        }

    def graph(self, component: str, taps: tuple[str, ...], profile: Profile) -> Graph:
        """Give the graph of an engine, exported if it is not there."""
        return prepare_graph(self.cache, self.backend, self.model, component, taps, profile, self.device)

    def open_engine(self, graph: Graph, profile: Profile, built: Path | None) -> Engine:
        """Open an engine; ``built`` is the folder of its files, if it has any."""
        engine = self.backend.open(graph, profile, self.device, self.threads, built)
        _LOG.debug("opened %s on %s (%s) for %s", graph.name, self.backend.name, self.device, profile.label)
        return engine

    def fidelity(self, graph: Graph, profile: Profile, built: Path | None) -> dict[str, TensorParity] | None:
        """Run an engine and the float32 reference on the same feeds: the parity of every output.

        The reference is torch where it is installed, else onnxruntime. None for the reference itself, which just runs.

        Raises:
            NonFiniteError: the engine's outputs are not all finite.
        """
        feeds = fidelity_feeds(built, graph, profile)
        name = "ort" if get_backend("torch").missing() else "torch"
        if self.backend.name in (name, "torch") and profile.precision == "fp32":
            with self.backend.open(graph, profile, self.device, self.threads, built) as engine:
                engine.run(feeds)
            return None
        reference = graph
        if name == "ort" and graph.precision != "fp32":
            exact = replace(profile, precision="fp32")
            reference = prepare_graph(
                self.cache, get_backend("ort"), self.model, graph.component, graph.taps, exact, "cpu"
            )
        parity = measure(
            graph,
            profile,
            self.backend.name,
            self.device,
            self.threads,
            built,
            feeds=feeds,
            against=(name, reference),
        )
        for output, one in parity.items():
            _LOG.info("%s %s against %s: %s", graph.name, output, name, one.summary)
        return parity

    def record(self) -> dict[str, object]:
        """Where the checkpoint lies, so that an engine can be measured again; no part of its identity."""
        return {"model": {"name": self.model.name, "folder": str(self.model.folder.resolve())}}


@dataclass(frozen=True)
class RecipeEngines:
    """The engines of a recipe in an environment: which there are, and their files built.

    Attributes:
        environment: where they run.
        recipe: what is wanted of the checkpoint.
        batch: most images in one run.
        calibrate: pictures and folders of pictures for precisions that are calibrated; none for the bundled ones.
    """

    environment: Environment
    recipe: Recipe
    batch: int = 1
    calibrate: tuple[Path, ...] = ()

    def prompts(self) -> list[NDArray[np.float32]]:
        """Give each branch's prompt, ``(T, D)`` float32; one of them where it depends on what is in an image."""
        return embed_prompts(self.recipe, self.environment.model, self.environment.cache)

    def encoder_profile(self) -> Profile:
        """Give the profile of the encoder's engine."""
        return Profile(self.recipe.size, batch=self.batch, precision=self.environment.precision)

    def tapped_profile(self, tokens: int) -> Profile:
        """Give the profile of a tapped network's engine, for prompts of so many tokens."""
        at = self.environment
        members = run_members(at.backend, at.device, at.model, self.recipe)
        return Profile(self.recipe.size, members, tokens, self.batch, at.precision)

    def plan(self) -> list[tuple[str, tuple[str, ...], Profile]]:
        """List component, taps and profile of every engine of the recipe, the encoder's first."""
        encoder = (
            [(self.environment.model.encoder, (), self.encoder_profile())] if self.environment.model.encoder else []
        )
        tapped = [
            (self.environment.model.tapped, branch.taps, self.tapped_profile(len(prompt)))
            for branch, prompt in zip(self.recipe.branches, self.prompts(), strict=True)
        ]
        return list(dict.fromkeys([*encoder, *tapped]))

    def built(self, graph: Graph, profile: Profile) -> Path | None:
        """Give the folder of an engine's files, built and measured if it is not there; None for one without files."""
        at = self.environment
        if not at.backend.builds(profile, at.device):
            return None
        with contextlib.ExitStack() as stack:
            calibration = self._calibration(stack)

            def check(folder: Path) -> Mapping[str, object]:
                hindrance = at.backend.cannot_run(at.device)
                if hindrance:
                    return {**at.record(), "not_run": hindrance}
                if profile.precision in CALIBRATED:
                    with output_errors(folder):
                        _save(folder / _PROBE, calibration.probe(graph, profile))
                return {**at.record(), **report_of(at.fidelity(graph, profile, folder))}

            return ensure_built(at.cache, graph, at.backend, profile, at.device, calibration, check)

    def open_engine(self, component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
        """Open an engine, making first what it lacks: its graph, its files."""
        graph = self.environment.graph(component, taps, profile)
        return self.environment.open_engine(graph, profile, self.built(graph, profile))

    def _calibration(self, stack: contextlib.ExitStack) -> RecipeCalibration:
        """Calibrate on the images; the encoder's engine is opened when first needed, and closed with the stack."""

        @cache
        def encoder() -> Engine:
            profile = self.encoder_profile()
            return stack.enter_context(self.open_engine(str(self.environment.model.encoder), (), profile))

        return RecipeCalibration(
            self.environment.model,
            self.recipe,
            lambda: calibration_images(self.calibrate),
            self.prompts,
            encoder,
            chosen=bool(self.calibrate),
        )


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    with open(path, "wb") as out:
        np.savez(out, allow_pickle=False, **arrays)


def report_of(parity: Mapping[str, TensorParity] | None) -> dict[str, object]:
    """Parities as a manifest keeps them."""
    return {} if parity is None else {"parity": {name: one.to_dict() for name, one in parity.items()}}
