"""Feeds made from real images, for post-training quantisation, with a recipe's noise, timesteps and prompts.

Quantisation measures the ranges of values inside a network, so it must see what the network will be fed in use. The
encoder gets images laid on its input. The tapped network gets the posterior that the encoder's own engine computes for
them, with the recipe's noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PIL
from PIL import ImageDraw

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine.backend import Array, Calibration, Engine, Graph, Profile
from difftap.engine.featurizer import encode, lay
from difftap.engine.noise import network_feeds
from difftap.images import Image, load_image
from difftap.recipe import Recipe

__all__ = ["MAX_IMAGES", "RecipeCalibration", "bundled_images"]

MAX_IMAGES = 32
"""Most images to calibrate on: more hardly change the ranges, and cost minutes at full size."""


def bundled_portraits() -> list[Image]:
    """Load the two bundled photographs."""
    folder = Path(str(resources.files("difftap"))) / "assets" / "calibration"
    return [load_image(folder / "collins.jpg"), load_image(folder / "hopper.jpg")]


def bundled_images() -> list[Image]:
    """Load the images to calibrate on if the user names none.

    They are a portrait, two mirrored parts of it, and three seeded pictures of overlapping discs. The discs' sizes
    follow a power law (the dead leaves model of Lee, Mumford and Huang 2001), so the pictures have edges and flat areas
    at all scales, as photographs do. The last image is another portrait: the engine's error is measured on it.
    """
    seen, kept = bundled_portraits()
    height, width = seen.pixels.shape[:2]
    parts = [seen.pixels[: height * 2 // 3, : width * 2 // 3], seen.pixels[height // 3 :, width // 3 :]]
    mirrored = [Image(np.ascontiguousarray(part[:, ::-1]), f"{seen.path} (part)") for part in parts]
    return [seen, *mirrored, *(Image(_dead_leaves(seed), f"<discs {seed}>") for seed in range(3)), kept]


def _dead_leaves(seed: int, side: int = 512, count: int = 3000) -> NDArray[np.uint8]:
    """Draw overlapping discs with sizes from a power law, ``(side, side, 3)``."""
    stream = np.random.default_rng([7, seed])
    picture = PIL.new("RGB", (side, side))
    draw = ImageDraw.Draw(picture)
    # Radii with density r^-3 between 4 pixels and half the side, drawn by inverting the cumulative distribution.
    least, most = 4.0, side / 2
    radii = (least**-2 - stream.random(count) * (least**-2 - most**-2)) ** -0.5
    for radius, (x, y), colour in zip(
        radii, stream.random((count, 2)) * side, stream.integers(0, 256, (count, 3)), strict=True
    ):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(c) for c in colour))
    return np.asarray(picture, np.uint8)


@dataclass(frozen=True)
class RecipeCalibration(Calibration):
    """Calibration on the feeds that a recipe makes.

    ``find``, ``prompts`` and ``encoder`` are functions, so that nothing is loaded unless an engine must be built.

    Attributes:
        model: the checkpoint.
        recipe: resolution, noise, seed, branches.
        find: loads the images; if there are more than `MAX_IMAGES`, so many are taken at even steps.
        prompts: makes each branch's prompt, ``(T, D)`` float32.
        encoder: opens the encoder's engine; not called if the model has no encoder.
        chosen: whether the user named the images; if so, an engine calibrated on others is built again.
    """

    model: Checkpoint
    recipe: Recipe
    find: Callable[[], Sequence[Image]]
    prompts: Callable[[], Sequence[NDArray[np.float32]]]
    encoder: Callable[[], Engine]
    chosen: bool = False

    @cached_property
    def images(self) -> list[Image]:
        """The images that are used. The last one is not calibrated on: the error is measured on it."""
        found = self.find()
        count = min(len(found), MAX_IMAGES)
        return [found[i * len(found) // count] for i in range(count)]

    @property
    def key(self) -> str:
        """16 hex digits that identify the images that are used."""
        return hashlib.sha256("\n".join(image.digest for image in self.images).encode()).hexdigest()[:16]

    def __call__(self, graph: Graph, profile: Profile) -> Iterator[Mapping[str, Array]]:
        """Yield the feeds of one image at a time; for the tapped network, the branches with these taps take turns."""
        for i, image in enumerate(self.images[:-1] or self.images):
            yield self._feeds(graph, profile, image, i)

    @property
    def measured_on(self) -> list[Image]:
        """The images that the error is measured on, none of them calibrated on.

        The user's last one, if there are several, and where the user chose them the bundled portraits: pictures that
        are all alike (one flat grey, say) would find an engine good that is of no use on a photograph.
        """
        used = {image.digest for image in self.images[:-1] or self.images}
        others = [*self.images[-1:], *(bundled_portraits() if self.chosen else [])]
        return [image for image in others if image.digest not in used]

    def probe(self, graph: Graph, profile: Profile) -> Mapping[str, Array]:
        """Make feeds from the images of `measured_on`, one behind another along the first axis."""
        feeds = [self._feeds(graph, profile, image, 0) for image in self.measured_on]
        return {name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]}

    def _feeds(self, graph: Graph, profile: Profile, image: Image, turn: int) -> Mapping[str, Array]:
        laid = lay(self.recipe, [image])
        if graph.component == self.model.encoder:
            return {"image": laid.pixels}
        branches = [
            (branch, prompt)
            for branch, prompt in zip(self.recipe.branches, self.prompts(), strict=True)
            if branch.taps == graph.taps and len(prompt) == profile.tokens
        ]
        branch, prompt = branches[turn % len(branches)]
        encoded = encode(self.recipe, self.encoder() if self.model.encoder else None, laid, profile.ensemble)
        feeds = network_feeds(self.model, branch.timestep, self.recipe.noise, encoded.given, encoded.noises, prompt)
        return {name: np.asarray(value) for name, value in feeds.items()}
