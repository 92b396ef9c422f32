"""The pipeline of a recipe: it opens the model, graphs, engines and prompts, and turns images into feature maps.

Here everything below comes together: what is missing is exported, the engines are opened, the branches are joined. The
command line and the benchmarks use it.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Self

from difftap.artifacts.files import JsonObject
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import (
    BranchEngine,
    Engine,
    Features,
    Featurizer,
    Graph,
    Latents,
    Profile,
)
from difftap.engine.backend import CALIBRATED
from difftap.errors import RecipeError
from difftap.featuremap import FeatureMap
from difftap.images import Image
from difftap.matching import combine
from difftap.pipeline.conditioning import LATENTS_KEPT, EngineOpener, open_book, small_engine
from difftap.pipeline.environment import RecipeEngines, Runtime
from difftap.pipeline.fastest import open_environment
from difftap.prompts import Prompt, PromptBook, Subject, wants_category
from difftap.prompts.learned import pinned
from difftap.recipe import Recipe

__all__ = ["Pipeline", "Provider"]

_LOG = logging.getLogger("difftap")


class Provider(ABC):
    """Gives feature maps of images: computed by engines (`Pipeline`), or read from a store if it holds them.

    Attributes:
        recipe: decides the numbers; if it has learned prompts, it names the file that was read by its hash.
        model: the checkpoint.
        conditions: recipe, model, backend, device, threads, versions; they are stored with every result.
        batch: number of images that is best taken at once; 1 on a CPU.
        prompts: which prompts an image gets, and their embeddings.
        served: number of images whose features a store held; 0 without a store.
        extracted: number of images that a store lacked, so that they were computed; 0 without a store.
    """

    from_store: int = 0
    not_in_store: int = 0

    def __init__(
        self, recipe: Recipe, model: Checkpoint, conditions: JsonObject, batch: int, prompts: PromptBook
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.conditions = conditions
        self.batch = batch
        self.prompts = prompts

    @abstractmethod
    def features(self, images: Iterable[Image], prompts: Sequence[Prompt | None] | None = None) -> Iterator[Features]:
        """Stream every branch's and tap's map of each image, in order.

        Args:
            images: any number; they are taken one batch at a time.
            prompts: the prompt of each branch for these images (`difftap.prompts.choose_prompts`). A branch whose
                prompt is None is not run, and is missing in the result. By default the recipe's own prompts, for images
                of no named category; prompts made from an image are made for each image.
        """

    @property
    @abstractmethod
    def stages(self) -> Featurizer:
        """The stages of `features`, for code that runs them in parallel: ``lay``, ``encode``, ``tap``."""

    @abstractmethod
    def close(self) -> None:
        """Release the engines."""

    def join(self, features: Features) -> FeatureMap:
        """Join the maps of all branches and taps into one, by the recipe's shares.

        Cosines of the joined map are those of both ``concat`` and ``score-sum``.

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
        """Stream each image's maps, branch by branch and tap by tap, in order: the input of `MatchRule.fuse`.

        Arguments and errors are those of `extract`.
        """
        return map(_flat, self._each(images, category))

    def extract(self, images: Iterable[Image], category: str | None = None) -> Iterator[FeatureMap]:
        """Stream each image's joined map, ``(C, h, w)`` with its geometry, in order.

        Args:
            images: any number.
            category: class of the object. It fills ``{category}`` in texts (they stay empty if it is None), or chooses
                among prompts learned for classes.

        Raises:
            InputError: learned prompts depend on a category and it is None; or they depend on pairs (see `pair`).
        """
        return map(self.join, self._each(images, category))

    def _each(self, images: Iterable[Image], category: str | None) -> Iterator[Features]:
        named = category is not None and self.prompts.depends_on != "image"
        return self.features(images, self.prompts.choose(Subject(category)) if named else None)

    def _alone(self, image: Image) -> Features:
        """Compute an image's features with a prompt made from the image itself."""
        self.prompts.know(image.digest, image)
        return next(self.features([image], self.prompts.choose(Subject(image=image.digest))))

    def pair(
        self, source: Image, target: Image, category: str | None = None
    ) -> tuple[tuple[FeatureMap, ...], tuple[FeatureMap, ...]]:
        """Give the maps of two images for matching them with each other, as `maps`; prompts may depend on the pair.

        Args:
            source: the image whose points are matched.
            target: the other image.
            category: class of the object that both show, if a prompt depends on it.
        """
        if self.prompts.depends_on != "pair":
            first, second = self.maps([source, target], category)
            return first, second
        for image in (source, target):
            self.prompts.know(image.digest, image)
        prompts = self.prompts.choose(Subject(category, pair=(source.digest, target.digest)))
        one, other = self.features([source, target], prompts)
        return _flat(one), _flat(other)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pipeline(Provider):
    """The provider that computes: everything that a recipe needs, opened.

    Use it as a context manager, or call `close`::

        with difftap.Pipeline.open(difftap.load_recipe("pocket")) as pipeline:
            a, b = pipeline.extract([difftap.load_image("a.jpg"), difftap.load_image("b.jpg")])
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Checkpoint,
        featurizer: Featurizer,
        branches: Sequence[BranchEngine],
        engines: list[Engine],
        conditions: JsonObject,
        batch: int,
        book: PromptBook,
    ) -> None:
        super().__init__(recipe, model, conditions, batch, book)
        self._featurizer = featurizer
        self._branches = tuple(branches)
        self._engines = engines
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
            BackendError, ArtifactError: an engine cannot be opened, or a file that it needs cannot be trusted.
        """
        # Pinned before anything is opened: conditions must name the prompts that are used, even if their file changes.
        recipe, runtime = pinned(recipe), runtime or Runtime()
        environment = open_environment(recipe, runtime)
        engines = RecipeEngines(environment, recipe, runtime.batch, runtime.calibrate)
        opened: dict[Hashable, Engine] = {}
        try:

            def engine(component: str, taps: tuple[str, ...], profile: Profile) -> Engine:
                key = (component, taps, profile)
                if key not in opened:  # branches that differ only in timestep or prompt share an engine
                    opened[key] = engines.open_engine(component, taps, profile)
                return opened[key]

            model, precision = environment.model, environment.precision
            encoder = engine(model.encoder, (), engines.encoder_profile()) if model.encoder else None
            if encoder is not None:  # if the runtime fell back to another device, the other engines use that one too
                environment = dataclasses.replace(environment, device=encoder.device)
                engines = dataclasses.replace(engines, environment=environment)
            latents = Latents(recipe, encoder, LATENTS_KEPT) if encoder and recipe.learned is not None else None

            def unet(taps: tuple[str, ...], profile: Profile) -> Engine:
                # These taps belong to no branch of the recipe, so there are no feeds to calibrate an engine on.
                exact = "fp32" if precision in CALIBRATED else precision
                return engine(model.tapped, taps, dataclasses.replace(profile, precision=exact))

            def small(graph: Graph) -> Engine:
                key = (graph.name, graph.path)
                opened[key] = small_engine(graph, environment.device, environment.threads)
                return opened[key]

            opening = EngineOpener(unet, small, encoder, latents)
            book = open_book(model, recipe, environment.cache, opening)
            branches = []
            for branch, tokens in zip(recipe.branches, book.any(), strict=True):  # (T, D)
                run = engine(model.tapped, branch.taps, engines.tapped_profile(len(tokens)))
                branches.append(BranchEngine(branch, run, tokens))
            if encoder is None:
                environment = dataclasses.replace(environment, device=branches[0].engine.device)
            batch = 1 if environment.device == "cpu" else runtime.batch  # why 1: see `difftap.engine.featurizer`
            featurizer = Featurizer(model, recipe, encoder, branches, batch, latents)
            conditions = environment.conditions(recipe) | book.conditions
        except BaseException:  # Ctrl-C too: engines may hold gigabytes of a GPU's memory
            for one in opened.values():
                one.close()
            raise
        return cls(recipe, model, featurizer, branches, list(opened.values()), conditions, batch, book)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The open engines, the encoder's first."""
        return tuple(self._engines)

    def features(self, images: Iterable[Image], prompts: Sequence[Prompt | None] | None = None) -> Iterator[Features]:
        """Stream every branch's and tap's map of each image, in order; see `Provider.features`."""
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
        """The stages of `features`, for code that runs them in parallel: ``lay``, ``encode``, ``tap``.

        Raises:
            InputError: an image has several maps under these prompts.
        """
        self.prompts.check_one_map_an_image()
        self._tell_of_missing_category()
        return self._featurizer

    def close(self) -> None:
        """Release the engines."""
        for engine in self._engines:
            engine.close()


def _flat(features: Features) -> tuple[FeatureMap, ...]:
    return tuple(one for taps in features.branches for one in taps.values())
