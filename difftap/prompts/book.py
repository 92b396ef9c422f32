"""All of a pipeline's prompts: which one an image gets, and its embedding, each made once.

Axis letters: T prompt tokens; D width of the UNet's cross-attention; N image tokens; C their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.memory import MemoryCache
from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache, Engine
from difftap.errors import InputError
from difftap.images import Image
from difftap.prompts.choose import Prompt, Subject, choose_prompts, embed, wants_category
from difftap.prompts.learned import LearnedPrompts
from difftap.recipe import Recipe

__all__ = ["ConditionalPrompts", "PromptBook"]

TOKENS_KEPT = 1 << 30
"""Bytes of image tokens that are remembered."""
EMBEDDINGS_KEPT = 256 << 20
"""Bytes of embeddings that are remembered, of texts and of pairs: those of some hundred prompts."""


class ConditionalPrompts:
    """Conditional prompts: what makes image tokens, and the networks that make a prompt of them.

    Args:
        tokens: from an image to its tokens ``(N, C)``.
        heads: one a branch, from both images' tokens to a sequence.
        text: from a sequence to what the UNet reads; None where the UNet reads the sequence itself.
    """

    def __init__(
        self, tokens: Callable[[Image], NDArray[np.float32]], heads: Sequence[Engine], text: Engine | None
    ) -> None:
        self._tokens = tokens
        self._heads = tuple(heads)
        self._text = text
        self._known: MemoryCache[str, NDArray[np.float32]] = MemoryCache(TOKENS_KEPT, lambda one: one.nbytes)
        self._names: dict[Hashable, str] = {}
        self.made = 0

    def knows(self, name: Hashable) -> bool:
        """Whether an image's tokens are remembered under a name."""
        digest = self._names.get(name, "")
        if digest not in self._known:
            return False
        self._known.touch(digest)
        return True

    def know(self, name: Hashable, image: Image) -> None:
        """Make an image's tokens, unless they are remembered."""
        self._names[name] = image.digest
        if image.digest in self._known:
            self._known.touch(image.digest)
            return
        self._known.put(image.digest, self._tokens(image))
        self.made += 1

    def embedding(self, branch: int, pair: tuple[Hashable, Hashable]) -> NDArray[np.float32]:
        """Make the prompt ``(T, D)`` of a pair whose images are known.

        Raises:
            InputError: one of them is not.
        """
        source, target = (self._names.get(name, "") for name in pair)
        if source not in self._known or target not in self._known:
            raise InputError("a conditional prompt was asked for images whose tokens are not known")
        tokens = {"source": self._known[source][None], "target": self._known[target][None]}
        sequence = self._heads[branch].run(tokens)["sequence"]
        hidden = sequence if self._text is None else self._text.run({"sequence": sequence})["hidden"]
        return np.asarray(hidden[0], np.float32)


class PromptBook:
    """What conditions a recipe's branches.

    Args:
        model: the checkpoint.
        recipe: its texts, or its learned prompts.
        cache: where text embeddings are kept.
        learned: the recipe's learned prompts, checked against model and recipe.
        conditional: what makes prompts of pairs, where the learned ones depend on them.
    """

    def __init__(
        self,
        model: Checkpoint,
        recipe: Recipe,
        cache: Cache,
        learned: LearnedPrompts | None = None,
        conditional: ConditionalPrompts | None = None,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._cache = cache
        self._learned = learned
        self._conditional = conditional
        self._embeddings: MemoryCache[Prompt, NDArray[np.float32]] = MemoryCache(
            EMBEDDINGS_KEPT, lambda one: one.nbytes
        )

    @property
    def depends_on(self) -> str:
        """What an image's prompts depend on: ``nothing``, ``category``, ``image`` or ``pair``."""
        if self._learned is None or self._recipe.learned is None:
            return "category" if wants_category(self._recipe.branches) else "nothing"
        mode = self._learned.mode(self._recipe.learned)
        return {"all": "nothing", "class": "category"}.get(mode, mode)

    def check_one_map_an_image(self) -> None:
        """Refuse prompts under which an image has several maps, which no store of features can hold.

        A text with a category in it stays empty where none is named, and so gives one map.

        Raises:
            InputError: learned prompts that depend on category, image or pair.
        """
        if self._learned is not None and self.depends_on != "nothing":
            raise InputError(
                f"a store holds one map an image, and the prompts in '{self._learned.path}' depend on its "
                f"{self.depends_on}; allowed: texts, and prompts learned by 'difftap tune single'"
            )

    @property
    def conditions(self) -> dict[str, Any]:
        """What must go with every number made under these prompts, beside the recipe."""
        if self._learned is None or self._recipe.learned is None:
            return {}
        mode = self._learned.mode(self._recipe.learned)
        return {"prompts": {"kind": self._learned.kind, "mode": mode, "sha256": self._learned.sha256}}

    def choose(self, subject: Subject) -> tuple[Prompt, ...]:
        """Choose what conditions every branch for an image of the subject; see `difftap.prompts.choose_prompts`."""
        return choose_prompts(self._recipe, subject, self._learned)

    def knows(self, name: Hashable) -> bool:
        """Whether an image needs not be made known (again) by this name."""
        return self._conditional is None or self._conditional.knows(name)

    def know(self, name: Hashable, image: Image) -> None:
        """Make an image known by a name that `Subject` uses; nothing where no prompt depends on images."""
        if self._conditional is not None:
            self._conditional.know(name, image)

    def embedding(self, prompt: Prompt) -> NDArray[np.float32]:
        """Give what the branch's cross-attention reads, float32 ``(T, D)``.

        Raises:
            ModelError: the model holds nothing that encodes prompts.
            MissingExtraError: the model's text encoder needs packages that are not installed.
            InputError: a conditional prompt's images are not known.
        """
        if prompt.row is not None and self._learned is not None:
            return np.asarray(self._learned.embeddings[prompt.branch][prompt.row], np.float32)
        if prompt in self._embeddings:
            self._embeddings.touch(prompt)
        elif prompt.pair is not None and self._conditional is not None:
            self._embeddings.put(prompt, self._conditional.embedding(prompt.branch, prompt.pair))
        else:
            self._embeddings.put(prompt, embed(self._model, prompt, self._cache))
        return self._embeddings[prompt]

    def any(self) -> list[NDArray[np.float32]]:
        """One embedding a branch, of the shape that all of them have; engines are opened with it."""
        if self._learned is not None:
            return [embeddings[0] for embeddings in self._learned.embeddings]
        return [self.embedding(prompt) for prompt in self.choose(Subject())]
