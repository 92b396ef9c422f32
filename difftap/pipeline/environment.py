"""Opening what a recipe runs on: cache, checkpoint, backend and device; and making its engines there.

Pipelines, ``difftap engines build`` and all commands that need a checkpoint or an engine use this file. So an engine is
made in the same way whoever asks for it first: its graph is exported, its files are built with calibration images, and
its error against the float32 reference is measured.
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
from difftap.artifacts.manifest import Manifest
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
from difftap.engine.builds import engine_manifest_path, ensure_built
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
_PROBE = "probe.npz"  # in the engine's folder: the feeds that its error was measured on


@dataclass(frozen=True)
class Runtime:
    """Where and how engines run. At fp32, none of this changes the features beyond rounding.

    Attributes:
        backend: name of a backend, or ``auto`` for the fastest one here (`difftap.pipeline.fastest`).
        device: one of the backend's, such as ``cpu`` or ``cuda``; or ``auto`` for its best one.
        threads: CPU threads; None for all that the process may use.
        batch: images per engine run on a GPU; a CPU runs one at a time.
        cache: the cache folder; None for the default one.
        precision: the types that engines compute in; any but fp32 changes the features by the error that the engine's
            manifest records.
        calibrate: pictures, and folders of pictures, for precisions that need calibration; empty for the bundled ones.
    """

    backend: str = "ort"
    device: str = "auto"
    threads: int | None = None
    batch: int = 1
    cache: Path | None = None
    precision: str = "fp32"
    calibrate: tuple[Path, ...] = ()


def open_cache(folder: Path | None = None) -> Cache:
    """Open a cache folder, or the default one. The folder is created by the first write."""
    return Cache(folder or default_cache_folder())


def open_checkpoint(reference: ModelReference, cache: Cache, size: Size | None = None) -> Checkpoint:
    """Find, build or download a checkpoint.

    Args:
        reference: which checkpoint.
        cache: where checkpoints are kept that are built here.
        size: the wanted input, ``(W, H)`` in pixels. A size that does not fit is refused before anything is built.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
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
    """Load the pictures to calibrate on.

    Args:
        paths: pictures and folders; of a folder, all pictures below it, sorted by path. Empty for the bundled ones.

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
    """Give the graph that a backend opens for a profile, in the variant that it needs; export it if it is missing.

    For a backend that runs the checkpoint itself, the graph has no file.

    Raises:
        MissingExtraError: it has to be made, and a package for exporting is not installed.
        ArtifactError, BackendError: as for `difftap.export.graphs.ensure_graph`.
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
    """Choose how many ensemble members one run of a backend takes."""
    if backend.fused_attention(device):
        return recipe.ensemble
    return members_per_run(model, recipe.size, recipe.ensemble)


def fidelity_feeds(built: Path | None, graph: Graph, profile: Profile) -> Mapping[str, Array]:
    """Give the feeds to measure an engine's error on: the real ones kept when it was built, or else seeded ones."""
    probe = built / _PROBE if built else None
    if probe is None or not probe.is_file():
        return example_feeds(graph, profile)
    with np.load(probe) as arrays:
        return {name: arrays[name] for name in arrays.files}


@dataclass(frozen=True)
class Environment:
    """Where networks run: a `Runtime` with all choices made, and the checkpoint.

    Attributes:
        cache: where artifacts are kept.
        model: the checkpoint.
        backend: the chosen backend.
        device: one of its devices.
        threads: CPU threads.
        precision: the types that engines compute in.
    """

    cache: Cache
    model: Checkpoint
    backend: Backend
    device: str
    threads: int
    precision: str = "fp32"

    @classmethod
    def open(cls, recipe: Recipe, runtime: Runtime, *, to_run: bool = True) -> Environment:
        """Choose where a recipe runs, and find its checkpoint.

        Args:
            recipe: names the checkpoint, and must fit it.
            runtime: must name a backend; `difftap.pipeline.fastest.open_environment` also takes ``auto``.
            to_run: refuse a precision that the backend lacks, and a backend that can build here but not run.

        Raises:
            InputError: the model, a tap, the size or the backend does not exist or does not fit.
            BackendError: the backend cannot be used here.
        """
        # What is quick to check comes first: finding the checkpoint may download or build gigabytes.
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
        """Give the conditions that are stored with every result: recipe, model, backend, versions, machine."""
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
        """Give the graph of an engine; export it if it is missing."""
        return prepare_graph(self.cache, self.backend, self.model, component, taps, profile, self.device)

    def open_engine(self, graph: Graph, profile: Profile, built: Path | None) -> Engine:
        """Open an engine.

        Args:
            graph: with its file.
            profile: shapes and precision.
            built: folder of the engine's files, if it has any.
        """
        engine = self.backend.open(graph, profile, self.device, self.threads, built)
        _LOG.debug("opened %s on %s (%s) for %s", graph.name, self.backend.name, self.device, profile.label)
        return engine

    def fidelity(self, graph: Graph, profile: Profile, built: Path | None) -> dict[str, TensorParity] | None:
        """Measure an engine's error: run it and the float32 reference on the same feeds.

        The reference is torch if it is installed, or else onnxruntime.

        Returns:
            the parity of every output; None if the engine is the reference itself, which is only run.

        Raises:
            NonFiniteError: the engine's outputs are not finite.
        """
        feeds = fidelity_feeds(built, graph, profile)
        name = "ort" if get_backend("torch").missing() else "torch"
        if self.backend.name in (name, "torch") and profile.precision == "fp32":
            with self.backend.open(graph, profile, self.device, self.threads, built) as engine:
                engine.run(feeds)  # nothing to compare with, but a fault shows now
            return None
        reference = graph
        # Torch runs the checkpoint itself. ONNX Runtime would run this graph, so it needs the exact one instead.
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
        """Name the checkpoint's folder for an engine's report, so that its error can be measured again."""
        return {"model": {"name": self.model.name, "folder": str(self.model.folder.resolve())}}


@dataclass(frozen=True)
class RecipeEngines:
    """The engines of a recipe in an environment: lists, builds and opens them.

    Attributes:
        environment: where they run.
        recipe: what they compute.
        batch: most images in one run.
        calibrate: pictures, and folders of pictures, for precisions that need calibration; empty for the bundled ones.
    """

    environment: Environment
    recipe: Recipe
    batch: int = 1
    calibrate: tuple[Path, ...] = ()

    def prompts(self) -> list[NDArray[np.float32]]:
        """Give each branch's prompt, ``(T, D)`` float32; any one, if prompts depend on images."""
        return embed_prompts(self.recipe, self.environment.model, self.environment.cache)

    def encoder_profile(self) -> Profile:
        """Give the profile of the encoder's engine."""
        return Profile(self.recipe.size, batch=self.batch, precision=self.environment.precision)

    def tapped_profile(self, tokens: int) -> Profile:
        """Give the profile of a tapped network's engine, for prompts of ``tokens`` tokens."""
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
        return list(dict.fromkeys([*encoder, *tapped]))  # branches with the same taps share an engine

    def built(self, graph: Graph, profile: Profile) -> Path | None:
        """Give the folder of an engine's files; build and measure it if it is missing. None if it has no files."""
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
                    # Kept with the engine: the pictures may be gone when its error is measured again.
                    with output_errors(folder):
                        _save(folder / _PROBE, calibration.probe(graph, profile))
                return {**at.record(), **report_of(at.fidelity(graph, profile, folder))}

            folder = ensure_built(at.cache, graph, at.backend, profile, at.device, calibration, check)
        if profile.precision in CALIBRATED:
            _warn_of_low_fidelity(graph, profile, engine_manifest_path(at.cache, graph, at.backend, profile, at.device))
        return folder

    def open_engine(self, component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
        """Open an engine; first make its graph and its files, if they are missing."""
        graph = self.environment.graph(component, taps, profile)
        return self.environment.open_engine(graph, profile, self.built(graph, profile))

    def _calibration(self, stack: contextlib.ExitStack) -> RecipeCalibration:
        """Make the calibration; the encoder's engine is opened when it is first needed, and closed with the stack."""

        @cache  # asked for at every image
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


LEAST_COSINE = 0.95
"""Mean cosine to float32 below which a calibrated engine is warned of each time it is used."""


def _warn_of_low_fidelity(graph: Graph, profile: Profile, manifest: Path) -> None:
    """Say so if an engine was found to be far from float32 on pictures that it was not calibrated on."""
    parity = Manifest.load(manifest).report.get("parity") or {}
    cosine = min((float(one["cosine_mean"]) for one in parity.values()), default=1.0)
    if cosine < LEAST_COSINE:
        _LOG.warning(
            "%s in %s reaches a mean cosine of only %.2f to float32 on pictures that it was not calibrated on; "
            "give more and other pictures by --calibrate, or take another precision",
            graph.name,
            profile.precision,
            cosine,
        )


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    with open(path, "wb") as out:
        np.savez(out, allow_pickle=False, **arrays)


def report_of(parity: Mapping[str, TensorParity] | None) -> dict[str, object]:
    """Give parities as a manifest's report holds them."""
    return {} if parity is None else {"parity": {name: one.to_dict() for name, one in parity.items()}}
