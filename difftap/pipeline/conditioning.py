"""Opening a recipe's prompts: check the prompt file, and open the networks that conditional prompts need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import (
    BranchEngine,
    Cache,
    Engine,
    Featurizer,
    Graph,
    Latents,
    Profile,
    choose_device,
    get_backend,
    model_key,
)
from difftap.errors import ArtifactError
from difftap.images import Image
from difftap.prompts import encode_prompt
from difftap.prompts.book import ConditionalPrompts, PromptBook
from difftap.prompts.learned import LearnedPrompts, load_learned
from difftap.prompts.tokens import TokenSource, dino_input, own_tokens
from difftap.recipe import Branch, Recipe

__all__ = ["LATENTS_KEPT", "EngineOpener", "checked", "embed_prompts", "open_book", "small_engine"]

LATENTS_KEPT = 1 << 30
"""Bytes of latents and noise to keep in memory, where an image is run under several prompts."""


@dataclasses.dataclass(frozen=True)
class EngineOpener:
    """What opens engines for a pipeline.

    Attributes:
        unet: opens the tapped network, cut after the given taps, for a profile, on the pipeline's backend.
        small: opens a small graph (a head, a text encoder, a token network) on ONNX Runtime.
        encoder: the encoder's engine; None if the backbone has none.
        latents: keeps images' posteriors and noise; shared with the pipeline.
    """

    unet: Callable[[tuple[str, ...], Profile], Engine]
    small: Callable[[Graph], Engine]
    encoder: Engine | None
    latents: Latents | None


def checked(recipe: Recipe, model: Checkpoint, cache: Cache) -> LearnedPrompts | None:
    """Load the recipe's learned prompts and make sure that they fit the model and the recipe; None if it has none.

    Raises:
        InputError: they are missing, or were learned for another model or recipe.
        ModelError: the file is damaged.
    """
    if recipe.learned is None:
        return None
    learned = load_learned(recipe.learned.path)
    learned.check(recipe.learned, recipe, model.name, model_key(cache, model))
    learned.mode(recipe.learned)  # raises if the kind has no such mode
    return learned


def open_book(model: Checkpoint, recipe: Recipe, cache: Cache, opening: EngineOpener) -> PromptBook:
    """Open a recipe's prompts, and the networks that they need.

    Raises:
        InputError, ModelError: as `checked`.
        ArtifactError: a conditional head is missing or stale.
        MissingExtraError: a network has to be exported and the packages for it are not installed.
    """
    learned = checked(recipe, model, cache)
    if learned is None or recipe.learned is None or learned.mode(recipe.learned) not in ("pair", "image"):
        return PromptBook(model, recipe, cache, learned)
    source = learned.image_tokens
    if source is None:
        raise ArtifactError(f"'{learned.path}' does not say where image tokens come from; learn it again")
    conditional = ConditionalPrompts(
        _tokens(model, recipe, cache, source, opening), _heads(model, cache, learned, source, opening),
        _text(model, cache, learned, opening),
    )  # fmt: skip
    return PromptBook(model, recipe, cache, learned, conditional)


def _heads(
    model: Checkpoint, cache: Cache, learned: LearnedPrompts, source: TokenSource, opening: EngineOpener
) -> list[Engine]:
    from difftap.export.conditional import head_graph

    heads = []
    for branch, embeddings in enumerate(learned.embeddings):
        length, width = embeddings.shape[1], int(learned.about["width"])
        shape = (source.count, source.channels, length, width)
        graph = head_graph(model, cache, learned.path, learned.sha256, branch, *shape)
        heads.append(opening.small(graph))
    return heads


def _text(model: Checkpoint, cache: Cache, learned: LearnedPrompts, opening: EngineOpener) -> Engine | None:
    if not (model.folder / "text_encoder").is_dir():
        return None
    from difftap.export.conditional import text_graph

    return opening.small(text_graph(model, cache, learned.embeddings[0].shape[1], int(learned.about["width"])))


def _tokens(
    model: Checkpoint, recipe: Recipe, cache: Cache, source: TokenSource, opening: EngineOpener
) -> Callable[[Image], NDArray[np.float32]]:
    """Make the function from an image to its tokens ``(N, C)``."""
    if source.kind == "dinov2":
        from difftap.export.conditional import dino_graph

        engine = opening.small(
            dino_graph(model, cache, source.network, source.weights, source.side, source.count, source.channels)
        )
        return lambda image: engine.run({"image": dino_input(image, source.side, source.fit)[None]})["tokens"][0]
    empty = encode_prompt(model, "", cache)
    branch = Branch((source.tap,), source.timestep)
    unet = opening.unet(branch.taps, Profile(recipe.size, 1, len(empty)))
    # Tokens come from one member. The first member of antithetic noise is the same as that of independent noise.
    noise = "none" if recipe.noise == "none" else "independent"
    plain = dataclasses.replace(recipe, branches=(branch,), ensemble=1, learned=None, combine="concat", noise=noise)
    own = Featurizer(model, plain, opening.encoder, [BranchEngine(branch, unet, empty)], latents=opening.latents)

    def tokens(image: Image) -> NDArray[np.float32]:
        (features,) = own([image])
        return own_tokens(features.branches[0][source.tap].data, source.grid)

    return tokens


def small_engine(graph: Graph, device: str, threads: int | None) -> Engine:
    """Open a small graph on ONNX Runtime, whatever the recipe's backend; on another device if it lacks this one."""
    backend = get_backend("ort")
    at = device if device in backend.devices() else choose_device(backend, "auto")
    return backend.open(graph, Profile((8, 8)), at, threads)  # no axis of theirs depends on the profile's size


def embed_prompts(recipe: Recipe, model: Checkpoint, cache: Cache) -> list[NDArray[np.float32]]:
    """Give an embedding ``(T, D)`` per branch for images of no named category; any, if prompts depend on images."""
    return PromptBook(model, recipe, cache, checked(recipe, model, cache)).any()
