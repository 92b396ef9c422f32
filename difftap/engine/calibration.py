"""Feeds of real images for post-training quantisation: the posterior, noise, timestep and prompt that a recipe gives.

A network's quantised ranges should be those of what it will really be fed. So the VAE encoder is shown the images as
they are laid on its input, and the UNet the posterior that the VAE's own engine gives for them, with the recipe's
noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.engine.backend import Calibration, Engine, Graph, Profile
from difftap.engine.extractor import branch_feeds, draw_noise
from difftap.images import Image, to_input
from difftap.model import Model
from difftap.recipe import Branch, Recipe

__all__ = ["MAX_IMAGES", "RecipeCalibration"]

MAX_IMAGES = 32
"""Images that are calibrated on at most; more change the ranges no further and cost minutes at full size."""


@dataclass(frozen=True)
class RecipeCalibration(Calibration):
    """Calibration on what a recipe feeds its networks.

    Attributes:
        model: the checkpoint.
        recipe: resolution, noise, seed, branches.
        images: what to calibrate on; of more than `MAX_IMAGES`, as many are taken at even steps.
        prompts: each branch's prompt, ``(T, D)`` float32.
        vae: opens the VAE's engine, whose posteriors the UNet is fed.
        chosen: whether the user named the images; then an engine calibrated on others is built again.
    """

    model: Model
    recipe: Recipe
    images: Sequence[Image]
    prompts: Sequence[NDArray[np.float32]]
    vae: Callable[[], Engine]
    chosen: bool = False

    @property
    def taken(self) -> list[Image]:
        """The images that are really used."""
        count = len(self.images)
        return [self.images[i * count // min(count, MAX_IMAGES)] for i in range(min(count, MAX_IMAGES))]

    @property
    def key(self) -> str:
        """16 hex digits of the images that are used."""
        return hashlib.sha256("\n".join(image.digest for image in self.taken).encode()).hexdigest()[:16]

    def __call__(self, graph: Graph, profile: Profile) -> Iterator[Mapping[str, NDArray[Any]]]:
        """One image at a time; for the UNet, every branch that reads these taps takes its turn."""
        recipe = self.recipe
        if graph.component == "vae":
            for image in self.taken:
                yield {"image": to_input(image, recipe.size, recipe.fit)[0][None]}
            return
        branches = [
            (branch, prompt)
            for branch, prompt in zip(recipe.branches, self.prompts, strict=True)
            if branch.taps == graph.taps and len(prompt) == profile.tokens
        ]
        for i, image in enumerate(self.taken):
            yield self._unet_feeds(image, *branches[i % len(branches)], profile.ensemble)

    def _unet_feeds(
        self, image: Image, branch: Branch, prompt: NDArray[np.float32], members: int
    ) -> Mapping[str, NDArray[Any]]:
        pixels, _ = to_input(image, self.recipe.size, self.recipe.fit)
        posterior = self.vae().run({"image": pixels[None]})
        noises = draw_noise(self.recipe, [image], posterior["mean"].shape[1:], members)
        feeds = branch_feeds(self.model, self.recipe, branch, prompt, posterior, 1)
        return {**feeds, "posterior_noise": noises[0], "noise": noises[1]}
