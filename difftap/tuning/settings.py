"""The settings that decide a training's result, besides model, recipe and data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from difftap.errors import InputError, RecipeError
from difftap.matching.rule import READINGS
from difftap.recipe import KINDS, Recipe

__all__ = ["DRAWS", "INITIALS", "JOINTS", "LOSSES", "OWN_TOKENS", "PRECISIONS", "TuneSettings"]

INITIALS = ("published", "empty", "random")
LOSSES = ("published", "normalised")
DRAWS = ("fresh", "fixed")
JOINTS = ("joint", "separate")
PRECISIONS = ("fp32", "bf16")
OWN_TOKENS = "own"
"""`TuneSettings.image_tokens` for the model's own features."""


@dataclass(frozen=True)
class TuneSettings:
    """How a prompt is learned. The defaults are SD4Match's, for the settings that it has.

    Attributes:
        kind: one of `difftap.recipe.KINDS`.
        epochs: passes over the training pairs.
        batch: pairs per step.
        rate: Adam's learning rate of embeddings.
        linear_rate: Adam's learning rate of the conditional head's linear layers.
        tokens: learned tokens per prompt; 0 for the model's own length (75 for CLIP).
        shared: how many of them do not depend on the pair (``cpm``); 0 for a third.
        initial: first values of learned tokens. ``published``: embeddings of random words with their positions (for
            ``cpm`` uniform from 0 to 1, as its positions and alpha); ``empty``: the empty prompt's with a little noise;
            ``random``: noise as wide as the model's own embeddings.
        joint: ``joint``: several branches are learned together on the fused score; ``separate``: each on its own.
        timesteps: one per branch; empty for the recipe's (``tuned_at``, else ``timestep``).
        reading: how pixels become cells: ``corners`` (SD4Match's rule), or ``centres``.
        loss: one of `LOSSES`; `difftap.tuning.loss` says how they differ.
        draws: posterior and noise of training images: drawn anew (``fresh``) in each step, or ``fixed`` for each image.
        image_tokens: where the image tokens of ``cpm`` come from: ``own``, or the folder or hub id of a DINOv2 network.
        image_tap: the tap that ``own`` tokens are read from.
        seed: seed of the first values and of the order of pairs.
        passes: pairs whose gradient is computed together; 0 for as many as fit. Fewer take less memory and more time.
        precision: ``fp32``, or ``bf16`` (autocast).
        checkpointing: recompute layers in the backward pass, which takes less memory and more time.
        steps: stop after this many steps, even within an epoch; 0 for no limit.

    Raises:
        InputError: a value is not allowed.
    """

    kind: str
    epochs: int = 5
    batch: int = 9
    rate: float = 0.01
    linear_rate: float = 0.001
    tokens: int = 0
    shared: int = 0
    initial: str = "published"
    joint: str = "joint"
    timesteps: tuple[int, ...] = ()
    reading: str = "corners"
    loss: str = "published"
    draws: str = "fresh"
    image_tokens: str = OWN_TOKENS
    image_tap: str = "up1"
    seed: int = 0
    passes: int = 0
    precision: str = "fp32"
    checkpointing: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(self.timesteps))  # a list, if it was read from JSON
        words = {
            "kind": KINDS,
            "initial": INITIALS,
            "joint": JOINTS,
            "reading": READINGS,
            "loss": LOSSES,
            "draws": DRAWS,
            "precision": PRECISIONS,
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        least = {"epochs": 1, "batch": 1, "tokens": 0, "shared": 0, "seed": 0, "passes": 0, "steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: {low} or more")
        for name in ("rate", "linear_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)}; allowed: a number above 0")
        if self.shared and self.kind != "cpm":
            raise InputError(f"shared is {self.shared}; allowed: with kind cpm alone")
        if self.tokens and self.shared >= self.tokens:
            raise InputError(f"shared is {self.shared} of {self.tokens} tokens; allowed: fewer")

    def check(self, recipe: Recipe) -> None:
        """Check that a recipe can use the prompts that will be learned for it.

        Raises:
            RecipeError: it takes prompts of another kind.
        """
        wanted = recipe.learned.kind if recipe.learned is not None else ""
        if wanted and wanted != self.kind:
            raise RecipeError(f"kind is {self.kind}; this recipe takes {wanted} prompts: use 'difftap tune {wanted}'")

    def to_dict(self) -> dict[str, object]:
        """Give plain data."""
        return dataclasses.asdict(self)
