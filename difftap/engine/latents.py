"""The posterior and the noise of images: what a UNet pass starts from, whatever its prompt.

Where several passes see an image (each pair has a prompt of its own, say), both are remembered, so that the VAE runs
once an image. Axis letters as in `difftap.engine.backend`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry
from difftap.engine.backend import Engine
from difftap.engine.noise import draw
from difftap.images import Image, to_input
from difftap.recipe import Recipe

__all__ = ["Latents", "Start"]


@dataclass(frozen=True)
class Start:
    """What one image's passes start from.

    Attributes:
        mean: ``(C, h, w)`` of the posterior.
        std: ``(C, h, w)``.
        noises: ``(2, E, C, h, w)``: the posterior's noise and the diffusion noise.
        geometry: takes the image's pixels to the input.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    noises: NDArray[np.float32]
    geometry: Geometry

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        return self.mean.nbytes + self.std.nbytes + self.noises.nbytes


class Latents:
    """Makes starts, and remembers them as far as a budget goes.

    Args:
        recipe: input size, fit, noise, seed and ensemble.
        vae: the VAE encoder's engine.
        budget: bytes to remember; 0 to remember nothing.

    Attributes:
        encoded: images that went through the VAE.
    """

    def __init__(self, recipe: Recipe, vae: Engine, budget: int = 0) -> None:
        self._recipe = recipe
        self._vae = vae
        self._budget = budget
        self._kept: OrderedDict[str, Start] = OrderedDict()
        self.encoded = 0

    def starts(self, images: Sequence[Image]) -> list[Start]:
        """Each image's start; those that are not remembered go through the VAE together."""
        found = {}
        for image in images if self._budget else ():
            if image.digest in self._kept:
                self._kept.move_to_end(image.digest)
                found[image.digest] = self._kept[image.digest]
        missing = [image for image in images if image.digest not in found]
        made = self._make(missing) if missing else []
        if not self._budget and len(made) == len(images):
            return made
        for image, start in zip(missing, made, strict=True):
            found[image.digest] = self._kept[image.digest] = start
        while len(self._kept) > 2 and sum(one.nbytes for one in self._kept.values()) > self._budget:
            self._kept.popitem(last=False)
        return [found[image.digest] for image in images]

    def _make(self, images: Sequence[Image]) -> list[Start]:
        recipe = self._recipe
        laid = [to_input(image, recipe.size, recipe.fit) for image in images]
        posterior = self._vae.run({"image": np.stack([values for values, _ in laid])})  # (B, 3, H, W)
        self.encoded += len(images)
        shape = posterior["mean"].shape[1:]
        starts = []
        for k, image in enumerate(images):
            if recipe.noise == "none":
                noises = np.zeros((2, 1, *shape), np.float32)
            else:
                pairs = recipe.noise == "antithetic"
                noises = np.stack(draw(recipe.seed, image.digest, recipe.ensemble, shape, pairs))
            mean, std = posterior["mean"][k], posterior["std"][k]
            if self._budget:  # a part of the batch's array would keep the whole of it
                mean, std = mean.copy(), std.copy()
            starts.append(Start(mean, std, noises, laid[k][1]))
        return starts
