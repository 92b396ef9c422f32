"""Engines of a recipe, made: graph exported, files built on calibrated feeds, and held against the float32 reference.

Opening a pipeline and ``difftap engines build`` both go this way, so an engine is the same whoever asked for it first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import output_errors
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Backend, Cache, Engine, Graph, Profile, get_backend, members_per_run
from difftap.engine.backend import CALIBRATED, Array
from difftap.engine.builds import ensure_built
from difftap.engine.calibration import RecipeCalibration, bundled_images
from difftap.engine.noise import example_feeds
from difftap.errors import InputError
from difftap.export.parity import TensorParity, measure
from difftap.images import PICTURE_ENDINGS, Image, find_pictures, load_image
from difftap.pipeline.conditioning import checked
from difftap.prompts import PromptBook
from difftap.recipe import Recipe

__all__ = ["Maker", "calibration_images", "fidelity_feeds", "prepare_graph", "report_of", "run_members"]

_LOG = logging.getLogger("difftap")
_PROBE = "probe.npz"


def calibration_images(paths: tuple[Path, ...]) -> list[Image]:
    """The pictures that are named, of a folder all below it in the order of their paths; the bundled ones for none.

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
    """The graph a backend opens for a profile: exported and trusted, in the types that the backend wants.

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
    """What an engine is held against its reference on: real feeds kept when it was built, else seeded ones."""
    probe = built / _PROBE if built else None
    if probe is None or not probe.is_file():
        return example_feeds(graph, profile)
    with np.load(probe) as arrays:
        return {name: arrays[name] for name in arrays.files}


@dataclass(frozen=True)
class Maker:
    """Makes a recipe's engines on one backend and device.

    Attributes:
        cache: where artefacts are kept.
        backend: the runtime.
        device: one of its devices.
        threads: CPU threads.
        model: the checkpoint.
        recipe: what is wanted of it.
        batch: most images in one run.
        precision: what engines compute in.
        calibrate: pictures and folders of pictures for precisions that are calibrated; none for the bundled ones.
    """

    cache: Cache
    backend: Backend
    device: str
    threads: int
    model: Checkpoint
    recipe: Recipe
    batch: int = 1
    precision: str = "fp32"
    calibrate: tuple[Path, ...] = ()

    def prompts(self) -> list[NDArray[np.float32]]:
        """Each branch's prompt, ``(T, D)`` float32; one of them where it depends on what is in an image."""
        return PromptBook(self.model, self.recipe, self.cache, checked(self.recipe, self.model, self.cache)).any()

    def encoder_profile(self) -> Profile:
        """Give the profile of the encoder's engine."""
        return Profile(self.recipe.size, batch=self.batch, precision=self.precision)

    def tapped_profile(self, tokens: int) -> Profile:
        """Give the profile of a tapped network's engine, for prompts of so many tokens."""
        members = run_members(self.backend, self.device, self.model, self.recipe)
        return Profile(self.recipe.size, members, tokens, self.batch, self.precision)

    def plan(self) -> list[tuple[str, tuple[str, ...], Profile]]:
        """List component, taps and profile of every engine of the recipe, the encoder's first."""
        encoder = [(self.model.encoder, (), self.encoder_profile())] if self.model.encoder else []
        tapped = [
            (self.model.tapped, branch.taps, self.tapped_profile(len(prompt)))
            for branch, prompt in zip(self.recipe.branches, self.prompts(), strict=True)
        ]
        return list(dict.fromkeys([*encoder, *tapped]))

    def graph(self, component: str, taps: tuple[str, ...], profile: Profile) -> Graph:
        """The graph of an engine, exported if it is not there."""
        return prepare_graph(self.cache, self.backend, self.model, component, taps, profile, self.device)

    def open(self, graph: Graph, profile: Profile, built: Path | None) -> Engine:
        """Open an engine."""
        engine = self.backend.open(graph, profile, self.device, self.threads, built)
        _LOG.debug("opened %s on %s (%s) for %s", graph.name, self.backend.name, self.device, profile.label)
        return engine

    def built(self, graph: Graph, profile: Profile) -> Path | None:
        """The folder of an engine's files, built and measured if it is not there; None for an engine without files."""
        if not self.backend.builds(profile, self.device):
            return None
        with contextlib.ExitStack() as stack:
            calibration = self._calibration(stack)

            def check(folder: Path) -> Mapping[str, Any]:
                hindrance = self.backend.cannot_run(self.device)
                if hindrance:
                    return {**self.record(), "not_run": hindrance}
                if profile.precision in CALIBRATED:
                    with output_errors(folder):
                        _save(folder / _PROBE, calibration.probe(graph, profile))
                return {**self.record(), **report_of(self.fidelity(graph, profile, folder))}

            return ensure_built(self.cache, graph, self.backend, profile, self.device, calibration, check)

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

    def record(self) -> dict[str, Any]:
        """Where the checkpoint lies, so that an engine can be measured again; no part of its identity."""
        return {"model": {"name": self.model.name, "folder": str(self.model.folder.resolve())}}

    def _calibration(self, stack: contextlib.ExitStack) -> RecipeCalibration:
        """Calibrate on the images; the encoder's engine is opened when first needed, and closed with the stack."""

        @cache
        def encoder() -> Engine:
            profile = self.encoder_profile()
            graph = self.graph(str(self.model.encoder), (), profile)
            return stack.enter_context(self.open(graph, profile, self.built(graph, profile)))

        return RecipeCalibration(
            self.model,
            self.recipe,
            lambda: calibration_images(self.calibrate),
            self.prompts,
            encoder,
            chosen=bool(self.calibrate),
        )


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    with open(path, "wb") as out:
        np.savez(out, allow_pickle=False, **arrays)


def report_of(parity: Mapping[str, TensorParity] | None) -> dict[str, Any]:
    """Parities as a manifest keeps them."""
    return {} if parity is None else {"parity": {name: one.to_dict() for name, one in parity.items()}}
