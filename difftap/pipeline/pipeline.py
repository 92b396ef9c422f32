"""A recipe made ready: model, graphs, engines and prompts opened together, images in, feature maps and matches out.

This is the one place where the rooms meet: it exports what is missing, opens the engines and joins the branches. The
command line and the benchmarks go through it.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import (
    Backend,
    BranchEngine,
    Cache,
    Engine,
    Features,
    Featurizer,
    Graph,
    Latents,
    Profile,
    check_precision,
    choose_device,
    default_cache_folder,
    get_backend,
    model_key,
)
from difftap.engine.backend import CALIBRATED
from difftap.errors import BackendError, RecipeError
from difftap.featuremap import FeatureMap
from difftap.images import Image
from difftap.machine import available_cores
from difftap.matching import combine
from difftap.pipeline.conditioning import LATENTS_KEPT, Opening, checked, open_book, small_engine
from difftap.pipeline.making import Maker, prepare_graph, run_members
from difftap.prompts import Prompt, PromptBook, Subject, wants_category
from difftap.prompts.learned import pinned
from difftap.recipe import Recipe

__all__ = [
    "Pipeline",
    "Runtime",
    "available_cores",
    "check_fits",
    "describe",
    "embed_prompts",
    "prepare_graph",
    "run_members",
]

_LOG = logging.getLogger("difftap")


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


class Pipeline:
    """Everything a recipe needs, open.

    Attributes:
        recipe: what decides the numbers; learned prompts in it are pinned to the file that was read.
        model: the checkpoint.
        conditions: what must go with every number made here: recipe, model, backend, device, threads, versions.
        batch: images per engine run: 1 on a CPU.
        prompts: which prompts an image gets, and their embeddings.

    Use it as a context manager, or call `close`.

    >>> import difftap
    >>> pipeline = difftap.Pipeline.open(difftap.load_recipe("pocket"))   # doctest: +SKIP
    >>> [a, b] = pipeline.extract([difftap.load_image("a.jpg"), difftap.load_image("b.jpg")])   # doctest: +SKIP
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Checkpoint,
        featurizer: Featurizer,
        branches: Sequence[BranchEngine],
        engines: list[Engine],
        conditions: dict[str, Any],
        batch: int,
        book: PromptBook,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.conditions = conditions
        self.batch = batch
        self._featurizer = featurizer
        self._branches = tuple(branches)
        self._engines = engines
        self.prompts = book
        self._told = False

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        runtime: Runtime | None = None,
    ) -> Pipeline:
        """Find the model, export the graphs that are missing, encode the prompts and open the engines.

        Raises:
            InputError: the model, a tap, the size or the backend does not exist or does not fit.
            MissingExtraError: something has to be exported or encoded and the packages for it are not installed.
            BackendError, ArtefactError: an engine cannot be opened, or a file it needs is not to be trusted.
        """
        from difftap.backbones.find import open_model
        from difftap.pipeline.fastest import resolve

        recipe = pinned(recipe)
        runtime = resolve(recipe, runtime or Runtime())
        cache = Cache(runtime.cache or default_cache_folder())
        backend = get_backend(runtime.backend)
        device = choose_device(backend, runtime.device)
        check_precision(backend, device, runtime.precision)
        hindrance = backend.cannot_run(device)
        if hindrance:
            raise BackendError(hindrance)
        threads = runtime.threads or available_cores()
        model = open_model(recipe.model, cache, size=recipe.size)
        check_fits(recipe, model)
        maker = Maker(
            cache, backend, device, threads, model, recipe, runtime.batch, runtime.precision, runtime.calibrate
        )
        opened: dict[tuple[Any, ...], Engine] = {}
        try:

            def engine(component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
                key = (component, taps, profile)
                if key not in opened:
                    graph = maker.graph(component, taps, profile)
                    opened[key] = maker.open(graph, profile, maker.built(graph, profile))
                return opened[key]

            encoder = engine(model.encoder, (), maker.encoder_profile()) if model.encoder else None
            if encoder is not None:
                device = encoder.device  # a runtime may have fallen back, and then the rest follows it
                maker = dataclasses.replace(maker, device=device)
            latents = Latents(recipe, encoder, LATENTS_KEPT) if encoder and recipe.learned is not None else None

            def unet(taps: tuple[str, ...], profile: Profile) -> Engine:
                # What prompts are made of is in no branch, so that there is nothing to calibrate it on.
                precision = "fp32" if runtime.precision in CALIBRATED else runtime.precision
                return engine(model.tapped, taps, dataclasses.replace(profile, precision=precision))

            def small(graph: Graph) -> Engine:
                key = (graph.name, graph.path)
                opened[key] = small_engine(graph, device, threads)
                return opened[key]

            opening = Opening(unet, small, encoder, latents)
            book = open_book(model, recipe, cache, opening)
            branches = []
            for branch, tokens in zip(recipe.branches, book.any(), strict=True):  # (T, D)
                run = engine(model.tapped, branch.taps, maker.tapped_profile(len(tokens)))
                branches.append(BranchEngine(branch, run, tokens))
            if encoder is None:
                device = branches[0].engine.device
            batch = 1 if device == "cpu" else runtime.batch
            featurizer = Featurizer(model, recipe, encoder, branches, batch, latents)
            said = describe(recipe, model, cache, backend, device, threads, runtime.precision)
            conditions = said | book.conditions
        except BaseException:
            for one in opened.values():
                one.close()
            raise
        return cls(recipe, model, featurizer, branches, list(opened.values()), conditions, batch, book)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that are open, the encoder's first."""
        return tuple(self._engines)

    def features(self, images: Iterable[Image], prompts: Sequence[Prompt | None] | None = None) -> Iterator[Features]:
        """Stream every branch's and tap's map of each image, in order.

        Args:
            images: any number, taken one batch at a time.
            prompts: what conditions each branch for these images (`difftap.prompts.choose_prompts`); a branch whose
                prompt is None is not run, and is left out of what is yielded. By default the recipe's own, for images
                of no named category; those that are made of the image are made for each.
        """
        if prompts is None:
            if self.prompts.depends_on == "image":
                return map(self._alone, images)
            self._tell_of_missing_category()
            if self.recipe.learned is None:
                return self._featurizer(images)
            prompts = self.prompts.choose(Subject())
        wanted = [
            dataclasses.replace(branch, prompt=self.prompts.embedding(prompt))
            for branch, prompt in zip(self._branches, prompts, strict=True)
            if prompt is not None
        ]
        return self._featurizer(images, wanted)

    def _tell_of_missing_category(self) -> None:
        if self.recipe.learned is None and wants_category(self.recipe.branches) and not self._told:
            self._told = True
            asked = ", ".join(sorted({f"'{branch.prompt}'" for branch in self.recipe.branches}))
            _LOG.info("the recipe prompts with %s, but no category is given: the prompt stays empty", asked)

    @property
    def stages(self) -> Featurizer:
        """The stages of `features`, for who runs them at once: ``lay``, ``encode``, ``tap``."""
        self.prompts.check_one_map_an_image()
        self._tell_of_missing_category()
        return self._featurizer

    def join(self, features: Features) -> FeatureMap:
        """The one map that the recipe's matcher reads: branches and taps joined by the recipe's shares.

        Its cosines are those of ``concat`` and ``score-sum`` alike.

        Raises:
            RecipeError: the recipe asks for ``score-product``, which no single map can give.
        """
        if self.recipe.combine == "score-product" and len(features.branches) > 1:
            raise RecipeError(
                "combine is 'score-product', which no single map can give; allowed here: concat, score-sum"
            )
        maps, shares = [], []
        for branch, taps in zip(self.recipe.branches, features.branches, strict=True):
            for tap in taps.values():
                maps.append(tap)
                shares.append(branch.weight / len(taps))
        return combine(maps, shares, self.recipe.upsample)

    def maps(self, images: Iterable[Image], category: str | None = None) -> Iterator[tuple[FeatureMap, ...]]:
        """Stream each image's maps, branch by branch and tap by tap, for `difftap.matching.Joining`; as `extract`."""
        return map(_flat, self._each(images, category))

    def extract(self, images: Iterable[Image], category: str | None = None) -> Iterator[FeatureMap]:
        """Stream each image's joined map, ``(C, h, w)`` with its geometry, in order.

        Args:
            images: any number.
            category: what the prompts depend on: it fills ``{category}`` in texts, which stay empty where it is None,
                or chooses among prompts learned for classes.

        Raises:
            InputError: learned prompts depend on a category and it is None, or on pairs (see `pair`).
        """
        return map(self.join, self._each(images, category))

    def _each(self, images: Iterable[Image], category: str | None) -> Iterator[Features]:
        named = category is not None and self.prompts.depends_on != "image"
        return self.features(images, self.prompts.choose(Subject(category)) if named else None)

    def _alone(self, image: Image) -> Features:
        """An image's features under a prompt made of itself."""
        self.prompts.know(image.digest, image)
        return next(self.features([image], self.prompts.choose(Subject(image=image.digest))))

    def pair(
        self, source: Image, target: Image, category: str | None = None
    ) -> tuple[tuple[FeatureMap, ...], tuple[FeatureMap, ...]]:
        """Both images' maps for matching them with one another, as `maps`; the prompts may depend on the pair.

        Args:
            source: the one whose points are looked for in the target.
            target: the other one.
            category: what both show, where a prompt depends on it.
        """
        if self.prompts.depends_on != "pair":
            first, second = self.maps([source, target], category)
            return first, second
        for image in (source, target):
            self.prompts.know(image.digest, image)
        prompts = self.prompts.choose(Subject(category, pair=(source.digest, target.digest)))
        one, other = self.features([source, target], prompts)
        return _flat(one), _flat(other)

    def close(self) -> None:
        """Release the engines."""
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _flat(features: Features) -> tuple[FeatureMap, ...]:
    return tuple(one for taps in features.branches for one in taps.values())


def check_fits(recipe: Recipe, model: Checkpoint) -> None:
    """Make sure, before anything slow starts, that a model can do what a recipe asks.

    Raises:
        RecipeError: the size, a tap or a timestep does not fit the model.
        ModelError: its noise schedule is of an unknown kind.
    """
    model.check(recipe)


def embed_prompts(recipe: Recipe, model: Checkpoint, cache: Cache) -> list[NDArray[np.float32]]:
    """Every branch's prompt for images of no named category, ``(T, D)`` each; one of them where it depends on more."""
    return PromptBook(model, recipe, cache, checked(recipe, model, cache)).any()


def describe(
    recipe: Recipe,
    model: Checkpoint,
    cache: Cache,
    backend: Backend,
    device: str,
    threads: int,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The conditions that go with every number: recipe, model, backend, precision, versions, machine."""
    from difftap.version import __version__

    return {
        "difftap": __version__,
        "recipe": recipe.to_dict(),
        "recipe_key": recipe.key(),
        "model": {"name": model.name, "key": model_key(cache, model)},
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
