"""What decides a training's result besides model, recipe and data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from difftap.errors import InputError, RecipeError
from difftap.recipe import KINDS, Recipe

__all__ = ["INITIALS", "JOINTS", "OWN_TOKENS", "PRECISIONS", "READINGS", "TuneSettings"]

INITIALS = ("empty", "random")
JOINTS = ("joint", "separate")
READINGS = ("centres", "corners")
PRECISIONS = ("fp32", "bf16")
OWN_TOKENS = "own"
"""`TuneSettings.image_tokens` for the model's own features."""


@dataclass(frozen=True)
class TuneSettings:
    """How a prompt is learned; the defaults are SD4Match's where it has one.

    Attributes:
        kind: one of `difftap.recipe.KINDS`.
        epochs: passes over the training pairs.
        batch: pairs a step.
        rate: Adam's, of embeddings.
        linear_rate: Adam's, of the conditional head's linear layers.
        tokens: learned tokens a prompt; 0 for the model's own length (75 for CLIP).
        shared: of them, those that do not depend on the pair (``cpm``); 0 for a third.
        initial: learned tokens begin at the ``empty`` prompt's, a little scattered, or ``random``.
        joint: several branches are learned ``joint``ly on the fused score, or each on its ``separate`` score.
        timesteps: one a branch, or none for the recipe's (``tuned_at``, else ``timestep``).
        reading: pixels to cells: ``centres``, or ``corners`` (SD4Match's rule).
        image_tokens: ``cpm``'s: ``own``, or the folder or hub id of a DINOv2 network.
        image_tap: where ``own`` tokens are read.
        seed: of first values and of the order of pairs.
        passes: pairs whose gradient is taken together; 0 for what fits; fewer take less memory, and more time.
        precision: ``fp32``, or ``bf16`` (autocast).
        checkpointing: recompute layers in the backward pass to save memory.
        steps: stop after so many steps, if that comes first; 0 for no limit.
    """

    kind: str
    epochs: int = 5
    batch: int = 9
    rate: float = 0.01
    linear_rate: float = 0.001
    tokens: int = 0
    shared: int = 0
    initial: str = "empty"
    joint: str = "joint"
    timesteps: tuple[int, ...] = ()
    reading: str = "centres"
    image_tokens: str = OWN_TOKENS
    image_tap: str = "up1"
    seed: int = 0
    passes: int = 0
    precision: str = "fp32"
    checkpointing: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        words = {
            "kind": KINDS,
            "initial": INITIALS,
            "joint": JOINTS,
            "reading": READINGS,
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
        """Make sure that a recipe can use what will be learned for it.

        Raises:
            RecipeError: it takes prompts of another kind.
        """
        wanted = recipe.learned.kind if recipe.learned is not None else ""
        if wanted and wanted != self.kind:
            raise RecipeError(f"kind is {self.kind}; this recipe takes {wanted} prompts: use 'difftap tune {wanted}'")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)
