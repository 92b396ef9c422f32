"""Choosing the prompt that conditions a branch for an image: the one place where this is decided.

A prompt may depend on what is looked for in an image (`Subject`). Code that makes features asks `choose_prompts` for
each image, and makes the features of each (image, branch, `Prompt`) once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.cache import Cache
from difftap.backbones.checkpoint import Checkpoint
from difftap.errors import InputError
from difftap.prompts.encode import encode_prompt
from difftap.prompts.learned import LearnedPrompts, remembered
from difftap.recipe import Branch, Recipe

__all__ = [
    "SLOT",
    "Prompt",
    "Subject",
    "choose_prompt",
    "choose_prompts",
    "embed",
    "fill",
    "made_of_images",
    "wants_category",
]

SLOT = "{category}"
"""Placeholder in a branch's prompt for the class of the object."""


@dataclass(frozen=True)
class Subject:
    """All that a prompt may depend on, besides its branch.

    Attributes:
        category: class of the object that is looked for; None if it was not named.
        image: the image's name, under which its tokens are known (`difftap.prompts.PromptBook.know`).
        pair: names of the source and the target image that are matched.
    """

    category: str | None = None
    image: Hashable = None
    pair: tuple[Hashable, Hashable] | None = None


@dataclass(frozen=True)
class Prompt:
    """The prompt of one branch. Equal prompts give equal features, so it can be the key of kept features.

    Attributes:
        text: the text encoder's input; empty for a learned prompt.
        branch: of a learned prompt: the branch that it was learned for.
        row: of a learned prompt: its row among the file's embeddings.
        pair: of a conditional prompt: the names of the images that it is made from.
    """

    text: str = ""
    branch: int = 0
    row: int | None = None
    pair: tuple[Hashable, Hashable] | None = None


def choose_prompt(branch: Branch, subject: Subject) -> Prompt:
    """Choose the text of a branch's prompt for an image of the subject.

    A prompt that needs a category is empty if none is named: "a photo of a" would be no sentence. Of a category that is
    a path only the last part is used, without parts in parentheses (PF-WILLOW has ``car(S)``).

    >>> choose_prompt(Branch(("up1",), 261, "a photo of a {category}"), Subject("car(S)")).text
    'a photo of a car'
    """
    if SLOT not in branch.prompt:
        return Prompt(branch.prompt)
    if subject.category is None:
        return Prompt("")
    word = re.sub(r"\([^()]*\)", "", subject.category.rsplit("/", 1)[-1]).strip()
    return Prompt(branch.prompt.replace(SLOT, word))


def choose_prompts(recipe: Recipe, subject: Subject, learned: LearnedPrompts | None = None) -> tuple[Prompt, ...]:
    """Choose the prompts of all branches for an image of the subject.

    Args:
        recipe: has texts, or names learned prompts, which replace the texts.
        subject: what is looked for in the image.
        learned: the recipe's learned prompts, if they are loaded already.

    Raises:
        InputError: the learned prompts depend on something that the subject does not name.
    """
    if recipe.learned is not None:
        learned = learned or remembered(recipe.learned.path)
        mode = learned.mode(recipe.learned)
        pair = subject.pair if mode == "pair" else (subject.image, subject.image)  # alone, an image is its own partner
        if mode in ("pair", "image"):
            if pair is None or None in pair:
                raise InputError(
                    f"'{learned.path}' makes a prompt for each {mode}, and none is named here; allowed: --prompt-mode "
                    "image, or class where a class is named"
                )
            return tuple(Prompt(branch=k, pair=pair) for k in range(len(recipe.branches)))
        row = learned.row(subject.category)
        return tuple(Prompt(branch=k, row=row) for k in range(len(recipe.branches)))
    return tuple(choose_prompt(branch, subject) for branch in recipe.branches)


def made_of_images(recipe: Recipe) -> bool:
    """Tell whether a recipe's prompts are made from the matched images: its maps then cannot be used for other pairs.

    Raises:
        InputError, ModelError: the learned prompts are missing or damaged, or have no such mode.
    """
    return recipe.learned is not None and remembered(recipe.learned.path).mode(recipe.learned) in ("pair", "image")


def embed(model: Checkpoint, prompt: Prompt, cache: Cache) -> NDArray[np.float32]:
    """Compute the embedding ``(T, D)`` of a text prompt.

    Raises:
        ModelError: the model has nothing that encodes prompts.
        MissingExtraError: the model's text encoder needs packages that are not installed.
    """
    return encode_prompt(model, prompt.text, cache)


def wants_category(branches: Sequence[Branch]) -> bool:
    """Tell whether the prompt of a branch depends on a category."""
    return any(SLOT in branch.prompt for branch in branches)


def fill(recipe: Recipe, subject: Subject) -> Recipe:
    """Fill in the texts of a recipe's prompts for one subject, so that its key stands for what was really computed."""
    if recipe.learned is not None:  # they are named by their hash, and the texts are not used
        return recipe
    branches = [
        dataclasses.replace(branch, prompt=prompt.text)
        for branch, prompt in zip(recipe.branches, choose_prompts(recipe, subject), strict=True)
    ]
    return dataclasses.replace(recipe, branches=tuple(branches))
