"""The streaming extractor: images in, one feature map per branch and tap out.

The VAE encoder runs once per image; the ensemble's noisy latents, the tapped UNet and the ensemble's mean are one
graph. On a CPU each image is one run whatever the batch size: the ensemble already fills the cores, and the features
are then the same bit for bit in any company. Axis letters as in `difftap.engine.backend`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Geometry, Size
from difftap.engine.backend import Engine, Value
from difftap.engine.latents import Latents
from difftap.engine.noise import draw
from difftap.errors import InputError
from difftap.featuremap import FeatureMap
from difftap.images import Image, to_input
from difftap.recipe import Branch, Recipe

__all__ = [
    "BranchEngine",
    "Encoded",
    "Features",
    "Featurizer",
    "Laid",
    "branch_feeds",
    "draw_noise",
    "latent_scales",
    "members_per_run",
]

_Maps = Mapping[str, NDArray[np.float32]]
"""A network's outputs by name, ``(B, C, h, w)`` each."""


ATTENTION_BUDGET = 1 << 30
"""Bytes that the largest attention table of one UNet run may take; about three of that size live at once."""


def members_per_run(model: Checkpoint, size: Size, ensemble: int) -> int:
    """How many ensemble members one UNet run takes: all, or as large a divisor of E as memory allows.

    Self-attention on the finest grid makes a table of (heads, cells, cells) per member: 1.7 GB at 768 px for Stable
    Diffusion 2.1. The answer depends on nothing but model and recipe, so it does not make features differ between
    machines.
    """
    heads = model.unet.get("num_attention_heads") or model.unet.get("attention_head_dim", 8)
    blocks = model.unet["down_block_types"]
    finest = next((i for i, kind in enumerate(blocks) if "Attn" in kind), 0)  # SDXL's first block has no attention
    count = int(heads[finest] if isinstance(heads, list) else heads)
    stride = model.latent_stride << finest
    cells = (size[0] // stride) * (size[1] // stride)
    most = max(1, ATTENTION_BUDGET // (4 * count * cells**2))
    return max(d for d in range(1, ensemble + 1) if ensemble % d == 0 and d <= most)


@dataclass(frozen=True)
class BranchEngine:
    """What one branch runs: its UNet engine and its prompt, ``(T, D)`` float32.

    The engine's profile says how many members it takes at once; the ensemble must be a multiple of that.
    """

    branch: Branch
    engine: Engine
    prompt: NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """All of one image's feature maps.

    Attributes:
        digest: the image's identity.
        branches: per branch of the recipe (or of those that were asked for), its taps' maps by name.
    """

    digest: str
    branches: tuple[Mapping[str, FeatureMap], ...]


@dataclass(frozen=True)
class Laid:
    """A batch of images laid on the network's input, ``(B, 3, H, W)`` in [-1, 1], with identities and geometries."""

    digests: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """A batch after the VAE: its posterior, ``(B, C, h, w)`` each, and its noises, ``(2, B, E, C, h, w)``."""

    laid: Laid
    posterior: _Maps
    noises: NDArray[np.float32]


class Featurizer:
    """Streams images through a model's engines.

    Args:
        model: the checkpoint.
        recipe: resolution, ensemble, noise, seed.
        vae: the VAE encoder's engine.
        branches: one per branch of the recipe.
        batch: images per engine run; the engines' profiles must allow it.
        latents: what remembers what passes start from, where an image is seen under several prompts; None for nothing.
    """

    def __init__(
        self,
        model: Checkpoint,
        recipe: Recipe,
        vae: Engine,
        branches: Sequence[BranchEngine],
        batch: int = 1,
        latents: Latents | None = None,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}; allowed: 1 or more images")
        self._model = model
        self._recipe = recipe
        self._vae = vae
        self._latents = latents
        self._branches = tuple(branches)
        self._batch = batch
        self._turn = threading.Lock()

    def __call__(self, images: Iterable[Image], branches: Sequence[BranchEngine] | None = None) -> Iterator[Features]:
        """Yield each image's features, in the images' order.

        Args:
            images: any number, taken one batch at a time.
            branches: to run in place of all, under prompts of their own perhaps.
        """
        pending = iter(images)
        while chunk := list(islice(pending, self._batch)):
            yield from self._extract(chunk, self._branches if branches is None else branches)

    def _extract(self, images: Sequence[Image], branches: Sequence[BranchEngine]) -> Iterator[Features]:
        """Run one batch of images."""
        if self._latents is not None:
            with self._turn:
                starts = self._latents.starts(images)
            posterior: Mapping[str, Value] = {
                name: np.stack([getattr(one, name) for one in starts]) for name in ("mean", "std")
            }
            noises = np.stack([one.noises[:, : self._recipe.ensemble] for one in starts], axis=1)  # (2, B, E, C, h, w)
            digests, geometries = tuple(image.digest for image in images), tuple(one.geometry for one in starts)
            with self._turn:
                outputs = [self._run_branch(branch, posterior, noises) for branch in branches]
            yield from _features(digests, geometries, self._finite(branches, outputs))
            return
        laid = self.lay(images)
        with self._turn:
            posterior = self._vae.run_on_device({"image": laid.pixels})
            noises = draw_noise(self._recipe, laid.digests, posterior["mean"].shape[1:], self._recipe.ensemble)
            outputs = [self._run_branch(branch, posterior, noises) for branch in branches]
        yield from _features(laid.digests, laid.geometries, self._finite(branches, outputs))

    # The same in three stages, for who runs them at once on batches of their own. Engines take turns: they would be in
    # each other's way. Some write the next run's outputs where the last one's are, so the posterior is brought home.

    def lay(self, images: Sequence[Image]) -> Laid:
        """Lay images on the network's input."""
        laid = [to_input(image, self._recipe.size, self._recipe.fit) for image in images]
        pixels = np.stack([values for values, _ in laid])  # (B, 3, H, W)
        return Laid(tuple(image.digest for image in images), tuple(geometry for _, geometry in laid), pixels)

    def encode(self, laid: Laid) -> Encoded:
        """Run the VAE encoder, and draw the noise."""
        with self._turn:
            posterior = self._vae.compute({"image": laid.pixels})
        self._vae.check_finite(posterior)
        noises = draw_noise(self._recipe, laid.digests, posterior["mean"].shape[1:], self._recipe.ensemble)
        return Encoded(laid, posterior, noises)

    def tap(self, encoded: Encoded) -> Iterator[Features]:
        """Run every branch's UNet."""
        with self._turn:
            outputs = [self._run_branch(branch, encoded.posterior, encoded.noises) for branch in self._branches]
        yield from _features(encoded.laid.digests, encoded.laid.geometries, self._finite(self._branches, outputs))

    @staticmethod
    def _finite(branches: Sequence[BranchEngine], outputs: Sequence[_Maps]) -> Sequence[_Maps]:
        """The branches' outputs, looked at when the turn is over: large maps take as long as a fast engine's run."""
        for branch, maps in zip(branches, outputs, strict=True):
            branch.engine.check_finite(maps)
        return outputs

    def _run_branch(
        self, branch: BranchEngine, posterior: Mapping[str, Value], noises: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float32]]:
        count, members = noises.shape[1:3]
        feeds = branch_feeds(self._model, self._recipe, branch.branch, branch.prompt, posterior, count)
        together = branch.engine.profile.ensemble
        total: dict[str, NDArray[np.float32]] = {}
        for start in range(0, members, together):
            part = slice(start, start + together)
            means = branch.engine.compute({**feeds, "posterior_noise": noises[0][:, part], "noise": noises[1][:, part]})
            total = {name: total[name] + mean for name, mean in means.items()} if total else means
        runs = members // together
        return total if runs == 1 else {name: value / np.float32(runs) for name, value in total.items()}


def draw_noise(recipe: Recipe, digests: Sequence[str], shape: tuple[int, ...], members: int) -> NDArray[np.float32]:
    """The posterior's noise and the diffusion noise of the first ``members`` members: ``(2, B, E, C, h, w)``.

    Args:
        recipe: whose seed and kind of noise.
        digests: the images' identities.
        shape: ``(C, h, w)`` of the latent.
    """
    latent = (shape[0], shape[1], shape[2])
    if recipe.noise == "none":
        return np.zeros((2, len(digests), members, *latent), np.float32)
    pairs = recipe.noise == "antithetic"
    draws = [draw(recipe.seed, digest, members, latent, pairs) for digest in digests]
    return np.stack([np.stack(pair) for pair in zip(*draws, strict=True)])


def branch_feeds(
    model: Checkpoint,
    recipe: Recipe,
    branch: Branch,
    prompt: NDArray[np.float32],
    posterior: Mapping[str, Value],
    count: int,
) -> dict[str, Value]:
    """All that a branch's UNet is fed for ``count`` images, but for the noises."""
    signal, sigma = latent_scales(model, branch.timestep, recipe.noise)
    return {
        "mean": posterior["mean"],
        "std": posterior["std"],
        "signal": np.full(count, signal, np.float32),
        "sigma": np.full(count, sigma, np.float32),
        "timestep": np.full(count, branch.timestep, np.int64),
        "prompt": np.repeat(prompt[None], count, axis=0),
    }


def latent_scales(model: Checkpoint, timestep: int, noise: str) -> tuple[float, float]:
    """Weights of the latent and of the noise at a timestep: DDPM's forward process (Ho et al. 2020, eq. 4).

    Raises:
        InputError: the schedule has no such timestep.
    """
    scaling = model.scaling_factor
    if noise == "none":  # a clean latent; the timestep still conditions the UNet (CleanDIFT)
        return scaling, 0.0
    schedule = model.alphas_cumprod
    if timestep >= len(schedule):
        raise InputError(f"timestep {timestep} of a schedule with {len(schedule)}; allowed: 0 to {len(schedule) - 1}")
    alpha = float(schedule[timestep])
    return alpha**0.5 * scaling, (1.0 - alpha) ** 0.5


def _features(digests: Sequence[str], geometries: Sequence[Geometry], outputs: Sequence[_Maps]) -> Iterator[Features]:
    for i, digest in enumerate(digests):
        yield Features(digest, tuple(_maps(output, i, geometries[i]) for output in outputs))


def _maps(output: _Maps, index: int, geometry: Geometry) -> dict[str, FeatureMap]:
    # A copy, so that keeping one image's map does not keep its whole batch in memory.
    return {
        name: FeatureMap(value[index] if len(value) == 1 else value[index].copy(), geometry)
        for name, value in output.items()
    }
