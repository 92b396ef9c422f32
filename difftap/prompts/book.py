"""All prompts of a pipeline: which prompt each image gets, and the prompts' embeddings, each made once.

Axis letters: T prompt tokens; D width of the UNet's cross-attention; N image tokens; C their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

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
"""Bytes of image tokens to keep in memory."""
EMBEDDINGS_KEPT = 256 << 20
"""Bytes of embeddings, of texts and of pairs, to keep in memory: those of a few hundred prompts."""


class ConditionalPrompts:
    """Prompts made from two images: the function that makes image tokens, and the networks that use them.

    Args:
        tokens: makes an image's tokens ``(N, C)``.
        heads: one per branch; make a sequence from both images' tokens.
        text: makes the UNet's input from a sequence; None if the UNet takes the sequence itself.
    """

    def __init__(
        self, tokens: Callable[[Image], NDArray[np.float32]], heads: Sequence[Engine], text: Engine | None
    ) -> None:
        self._tokens = tokens
        self._heads = tuple(heads)
        self._text = text
        self._known: MemoryCache[str, NDArray[np.float32]] = MemoryCache(TOKENS_KEPT, lambda one: one.nbytes)
        self._names: dict[Hashable, str] = {}  # the image's digest by each of its names: equal images share tokens
        self.made = 0

    def knows(self, name: Hashable) -> bool:
        """Tell whether the tokens of the image of a name are kept, and mark them as used."""
        digest = self._names.get(name, "")
        if digest not in self._known:
            return False
        self._known.touch(digest)
        return True

    def know(self, name: Hashable, image: Image) -> None:
        """Make an image's tokens, unless they are kept already."""
        self._names[name] = image.digest
        if image.digest in self._known:
            self._known.touch(image.digest)
            return
        self._known.put(image.digest, self._tokens(image))
        self.made += 1

    def embedding(self, branch: int, pair: tuple[Hashable, Hashable]) -> NDArray[np.float32]:
        """Make the prompt ``(T, D)`` of a branch for a pair of images.

        Raises:
            InputError: an image's tokens are not kept; call `know` first.
        """
        source, target = (self._names.get(name, "") for name in pair)
        if source not in self._known or target not in self._known:
            raise InputError("a conditional prompt was asked for images whose tokens are not known")
        tokens = {"source": self._known[source][None], "target": self._known[target][None]}
        sequence = self._heads[branch].run(tokens)["sequence"]
        hidden = sequence if self._text is None else self._text.run({"sequence": sequence})["hidden"]
        return np.asarray(hidden[0], np.float32)


class PromptBook:
    """The prompts of a recipe's branches.

    Args:
        model: the checkpoint.
        recipe: has texts or learned prompts.
        cache: where text embeddings are kept.
        learned: the recipe's learned prompts, checked against model and recipe.
        conditional: makes prompts of pairs, if the learned ones depend on pairs.
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
        """Refuse prompts under which an image has several maps: a store of features holds one map per image.

        Raises:
            InputError: the learned prompts depend on category, image or pair.
        """
        # Texts pass: one with a category in it stays empty where no category is named, and so gives one map.
        if self._learned is not None and self.depends_on != "nothing":
            raise InputError(
                f"a store holds one map an image, and the prompts in '{self._learned.path}' depend on its "
                f"{self.depends_on}; allowed: texts, and prompts learned by 'difftap tune single'"
            )

    @property
    def conditions(self) -> dict[str, dict[str, str]]:
        """The conditions of every number made under these prompts, besides the recipe: which learned prompts."""
        if self._learned is None or self._recipe.learned is None:
            return {}
        mode = self._learned.mode(self._recipe.learned)
        return {"prompts": {"kind": self._learned.kind, "mode": mode, "sha256": self._learned.sha256}}

    def choose(self, subject: Subject) -> tuple[Prompt, ...]:
        """Choose the prompt of every branch for an image of the subject; see `difftap.prompts.choose_prompts`."""
        return choose_prompts(self._recipe, subject, self._learned)

    def knows(self, name: Hashable) -> bool:
        """Tell whether `know` need not be called for a name: its image is known, or no prompt depends on images."""
        return self._conditional is None or self._conditional.knows(name)

    def know(self, name: Hashable, image: Image) -> None:
        """Make an image known by the name that `Subject` uses for it; do nothing if no prompt depends on images."""
        if self._conditional is not None:
            self._conditional.know(name, image)

    def embedding(self, prompt: Prompt) -> NDArray[np.float32]:
        """Give a prompt's embedding, which the branch's cross-attention takes: float32 ``(T, D)``.

        Raises:
            ModelError: the model has nothing that encodes prompts.
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
        """Give an embedding per branch, to open engines with: all embeddings of a branch have the same shape."""
        if self._learned is not None:
            return [embeddings[0] for embeddings in self._learned.embeddings]
        return [self.embedding(prompt) for prompt in self.choose(Subject())]
