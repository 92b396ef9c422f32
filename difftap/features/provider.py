"""Features from a store where they are, else from the engines: what stands in for a pipeline when a store is given.

Engines are opened when the first image is not in the store; a whole data set that is in needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Features, Featurizer, model_key
from difftap.errors import InputError
from difftap.features.store import FeatureStore
from difftap.images import Image
from difftap.pipeline.conditioning import checked
from difftap.pipeline.environment import Runtime
from difftap.pipeline.fastest import open_environment
from difftap.pipeline.pipeline import Pipeline, Provider
from difftap.prompts import Prompt, PromptBook, Subject
from difftap.prompts.learned import pinned
from difftap.recipe import Recipe

__all__ = ["StoreProvider", "is_store", "open_features", "precision_of", "precisions_agree"]

_FLOATING = ("fp32", "bf16x3", "fp16", "bf16")


def precision_of(conditions: Mapping[str, Any]) -> str:
    """Say what engines computed in, of features made under some conditions: those of the store, where one gave them."""
    made = conditions.get("store") or conditions
    return str(made.get("backend", {}).get("precision", "fp32"))


def precisions_agree(one: str, other: str) -> bool:
    """Whether features of two precisions may be compared: floating point agrees up to rounding, the rest does not."""
    return one == other or (one in _FLOATING and other in _FLOATING)


def is_store(place: Path) -> bool:
    """Whether a folder is a store that ``difftap extract`` wrote: those alone are zarr groups."""
    return (place / "zarr.json").is_file()


def open_features(recipe: Recipe, store: str | Path | None, runtime: Runtime | None = None) -> Provider:
    """Open a pipeline, or where a store is named what stands in for one.

    Args:
        recipe: decides the numbers.
        store: where extracted features lie; None for engines alone.
        runtime: for images that are not in.

    Raises:
        RecipeError: the store holds other features; names the first field that differs.
        InputError: no such store, or images that are not in would be computed in another precision than those that are.
    """
    if store is None:
        return Pipeline.open(recipe, runtime)
    source = StoreProvider.open(recipe, store, runtime)
    theirs, ours = precision_of(source.conditions), str(source.conditions["backend"]["precision"])
    if not precisions_agree(theirs, ours):
        raise InputError(
            f"the features in '{store}' were computed at {theirs}, and images that are not in would be at {ours}; give "
            f"--precision {theirs}"
        )
    return source


class StoreProvider(Provider):
    """The provider that looks into a store first, and opens a pipeline when an image is not in.

    An image is known by its pixels, wherever its file lies, and the store must have been made with the recipe's feature
    fields and the model. Stored features are as near to extracted ones as the store's encoding keeps them.

    Attributes:
        recipe: what decides the numbers.
        conditions: as a pipeline's, and which store, with its encoding and backend.
        batch: images per engine run.
        store: the store.
        not_in_store: how many images were not in.
        from_store: how many were.

    For instance::

        source = StoreProvider.open(recipe, "photos.zarr")
        [features] = source.features([difftap.load_image("a.jpg")])
    """

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        store: FeatureStore,
        model: Checkpoint,
        conditions: dict[str, Any],
        book: PromptBook,
        *,
        complete: bool,
    ) -> None:
        batch = 1 if conditions["backend"]["device"] == "cpu" else runtime.batch
        super().__init__(recipe, model, conditions, batch, book)
        self.store = store
        self._runtime = runtime
        self._complete = complete
        self._pipeline: Pipeline | None = None

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        path: str | Path,
        runtime: Runtime | None = None,
        *,
        complete: bool = False,
    ) -> StoreProvider:
        """Open a store for a recipe.

        Args:
            recipe: its feature fields must be the store's.
            path: the store.
            runtime: for images that are not in.
            complete: refuse images that are not in, instead of extracting them.

        Raises:
            InputError: no such store.
            RecipeError: the store holds other features, or those of a prompt file that was changed since; names the
                first field that differs.
        """
        store = FeatureStore.open(path)
        recipe, runtime = pinned(recipe), runtime or Runtime()
        environment = open_environment(recipe, runtime, to_run=False)
        model, cache = environment.model, environment.cache
        book = PromptBook(model, recipe, cache, checked(recipe, model, cache))
        book.check_one_map_an_image()
        store.check(recipe, model_key(cache, model), book.conditions.get("prompts"))
        conditions = environment.conditions(recipe) | book.conditions
        made = store.provenance
        conditions["store"] = {
            "encoding": made.encoding.to_dict(),
            "backend": made.conditions["backend"],
            "complete": complete,
        }
        return cls(recipe, runtime, store, model, conditions, book, complete=complete)

    @property
    def pipeline(self) -> Pipeline:
        """The engines, opened when first needed."""
        if self._pipeline is None:
            self._pipeline = Pipeline.open(self.recipe, self._runtime)
        return self._pipeline

    def features(self, images: Iterable[Image], prompts: Sequence[Prompt | None] | None = None) -> Iterator[Features]:
        """Each image's features, in order: from the store where it holds them, else extracted.

        Args:
            images: any number.
            prompts: as `difftap.Pipeline.features` takes them. The store holds features under the recipe's own, for no
                named category; under others they are extracted.

        Raises:
            InputError: an image is not in the store, and nothing is to be extracted.
        """
        own = self.prompts.choose(Subject())
        asked = own if prompts is None else prompts
        stored = all(one is None or one == other for one, other in zip(asked, own, strict=True))
        waiting: list[tuple[Image, str | None]] = []
        missing = 0
        for image in images:
            key = self.store.find(image.digest) if stored else None
            waiting.append((image, key))
            missing += key is None
            if not missing or missing >= self.batch:
                yield from self._serve(waiting, prompts)
                waiting, missing = [], 0
        yield from self._serve(waiting, prompts)

    def _serve(
        self, waiting: list[tuple[Image, str | None]], prompts: Sequence[Prompt | None] | None
    ) -> Iterator[Features]:
        fresh = iter(self._extract([image for image, key in waiting if key is None], prompts))
        for _, key in waiting:
            if key is None:
                yield next(fresh)
                continue
            read = self.store.read(key)
            self.from_store += 1
            if prompts is not None:  # branches that are not asked for are left out, as a pipeline does
                kept = [taps for taps, one in zip(read.branches, prompts, strict=True) if one is not None]
                read = Features(read.digest, tuple(kept))
            yield read

    def _extract(self, images: list[Image], prompts: Sequence[Prompt | None] | None) -> list[Features]:
        if not images:
            return []
        if self._complete:
            raise InputError(
                f"'{images[0].path}' is not in '{self.store.place}' under the prompts that are asked for; extract it "
                "into the store, or allow others to be extracted"
            )
        self.not_in_store += len(images)
        return list(self.pipeline.features(images, prompts))

    @property
    def stages(self) -> Featurizer:
        """The engines' own."""
        return self.pipeline.stages

    def close(self) -> None:
        """Release the engines, if any were opened."""
        if self._pipeline is not None:
            self._pipeline.close()
