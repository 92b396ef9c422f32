"""A recipe made ready: model, graphs, engines and prompts opened together, images in, feature maps and matches out.

This is the one place where the rooms meet: it exports what is missing, opens the engines and joins the branches. The
command line and the benchmarks go through it.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftap.engine import (
    Backend,
    BranchEngine,
    Cache,
    Engine,
    Extractor,
    Features,
    Graph,
    Profile,
    check_precision,
    choose_device,
    default_cache_folder,
    get_backend,
    members_per_run,
)
from difftap.engine.builds import ensure_built
from difftap.errors import RecipeError
from difftap.features import FeatureMap
from difftap.images import Image
from difftap.matching import combine
from difftap.model import Model
from difftap.recipe import Recipe

__all__ = ["Pipeline", "Runtime", "available_cores", "check_fits", "describe", "prepare_graph"]

_LOG = logging.getLogger("difftap")


@dataclass(frozen=True)
class Runtime:
    """Where and how engines run; at fp32, nothing here changes the features beyond rounding.

    Attributes:
        backend: name of a backend.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; None for all that the process may use.
        batch: images per engine run on a GPU; a CPU takes one at a time.
        cache: the cache folder; None for the default one.
        precision: what engines compute in; all but fp32 change the features a little, by what their manifests say.
    """

    backend: str = "ort"
    device: str = "auto"
    threads: int | None = None
    batch: int = 1
    cache: Path | None = None
    precision: str = "fp32"


class Pipeline:
    """Everything a recipe needs, open.

    Attributes:
        recipe: what decides the numbers.
        model: the checkpoint.
        conditions: what must go with every number made here: recipe, model, backend, device, threads, versions.
        batch: images per engine run: 1 on a CPU.

    Use it as a context manager, or call `close`.

    >>> import difftap
    >>> pipeline = difftap.Pipeline.open(difftap.load_recipe("pocket"))   # doctest: +SKIP
    >>> [a, b] = pipeline.extract([difftap.load_image("a.jpg"), difftap.load_image("b.jpg")])   # doctest: +SKIP
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        extractor: Extractor,
        engines: list[Engine],
        conditions: dict[str, Any],
        batch: int = 1,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.conditions = conditions
        self.batch = batch
        self._extractor = extractor
        self._engines = engines

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        runtime: Runtime | None = None,
        *,
        revision: str | None = None,
        random_weights: int | None = None,
    ) -> Pipeline:
        """Find the model, export the graphs that are missing, encode the prompts and open the engines.

        Raises:
            InputError: the model, a tap, the size or the backend does not exist or does not fit.
            MissingExtraError: something has to be exported or encoded and the packages for it are not installed.
            BackendError, ArtefactError: an engine cannot be opened, or a file it needs is not to be trusted.
        """
        from difftap.export.checkpoints import open_model
        from difftap.prompts import encode_prompt

        runtime = runtime or Runtime()
        cache = Cache(runtime.cache or default_cache_folder())
        backend = get_backend(runtime.backend)
        device = choose_device(backend, runtime.device)
        check_precision(backend, device, runtime.precision)
        threads = runtime.threads or available_cores()
        model = open_model(recipe.model, cache, revision=revision, random_weights=random_weights)
        check_fits(recipe, model)
        opened: dict[tuple[Any, ...], Engine] = {}
        try:

            def engine(component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
                key = (component, taps, profile)
                if key not in opened:
                    graph = prepare_graph(cache, backend, model, component, taps)
                    built = ensure_built(cache, graph, backend, profile, device)
                    opened[key] = backend.open(graph, profile, device, threads, built)
                    _LOG.debug("opened %s on %s (%s) for %s", graph.name, backend.name, device, profile.label)
                return opened[key]

            vae = engine("vae", (), Profile(recipe.size, batch=runtime.batch, precision=runtime.precision))
            device = vae.device  # a runtime may have fallen back, and then the rest follows it
            branches = []
            members = members_per_run(model, recipe.size, recipe.ensemble)
            for branch in recipe.branches:
                prompt = encode_prompt(model, branch.prompt, cache)
                profile = Profile(recipe.size, members, len(prompt), runtime.batch, runtime.precision)
                branches.append(BranchEngine(branch, engine("unet", branch.taps, profile), prompt))
            batch = 1 if device == "cpu" else runtime.batch
            extractor = Extractor(model, recipe, vae, branches, batch)
            conditions = describe(recipe, model, cache, backend, device, threads, runtime.precision)
        except BaseException:
            for one in opened.values():
                one.close()
            raise
        return cls(recipe, model, extractor, list(opened.values()), conditions, batch)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that are open, the VAE's first."""
        return tuple(self._engines)

    def features(self, images: Iterable[Image]) -> Iterator[Features]:
        """Stream every branch's and tap's map of each image, in order."""
        return self._extractor(images)

    def join(self, features: Features) -> FeatureMap:
        """The one map that the recipe's matcher reads: branches and taps joined by the recipe's shares.

        Its cosines are those of ``concat`` and ``score-sum`` alike.

        Raises:
            RecipeError: the recipe asks for ``score-product``, which no single map can give.
        """
        if self.recipe.combine == "score-product" and len(features.branches) > 1:
            raise RecipeError(
                "combine is 'score-product', which 'bench pck' alone offers; allowed here: concat, score-sum"
            )
        maps, shares = [], []
        for branch, taps in zip(self.recipe.branches, features.branches, strict=True):
            for tap in taps.values():
                maps.append(tap)
                shares.append(branch.weight / len(taps))
        return combine(maps, shares, self.recipe.upsample)

    def extract(self, images: Iterable[Image]) -> Iterator[FeatureMap]:
        """Stream each image's joined map, ``(C, h, w)`` with its geometry, in order."""
        return map(self.join, self.features(images))

    def close(self) -> None:
        """Release the engines."""
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available_cores() -> int:
    """The processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def check_fits(recipe: Recipe, model: Model) -> None:
    """Make sure, before anything slow starts, that a model can do what a recipe asks.

    Raises:
        RecipeError: the size, a tap or a timestep does not fit the model.
        ModelError: its noise schedule is of an unknown kind.
    """
    model.check_size(recipe.size)
    steps = len(model.alphas_cumprod)
    for branch in recipe.branches:
        if branch.timestep >= steps:
            raise RecipeError(
                f"timestep is {branch.timestep}; allowed: 0 to {steps - 1}, the schedule of '{model.name}'"
            )
        for name in branch.taps:
            model.tap(name)


def prepare_graph(cache: Cache, backend: Backend, model: Model, component: str, taps: tuple[str, ...] = ()) -> Graph:
    """The graph a backend opens: exported and trusted, or just named for a backend that runs the checkpoint itself."""
    if not backend.needs_graph:
        return Graph(model, component, taps)
    from difftap.export.graphs import ensure_graph

    return ensure_graph(cache, model, component, taps)


def describe(
    recipe: Recipe, model: Model, cache: Cache, backend: Backend, device: str, threads: int, precision: str = "fp32"
) -> dict[str, Any]:
    """The conditions that go with every number: recipe, model, backend, precision, versions, machine."""
    from difftap import __version__

    return {
        "difftap": __version__,
        "recipe": recipe.to_dict(),
        "recipe_key": recipe.key(),
        "model": {"name": model.name, "key": cache.model_key(model)},
        "backend": {
            "name": backend.name,
            "version": backend.version(),
            "device": device,
            "precision": precision,
            "threads": threads,
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "machine": platform.machine(),
    }
