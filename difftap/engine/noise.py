"""What networks are fed: the one place that draws noise, applies a backbone's schedule and names the feeds.

A backbone with a noise rule is fed the posterior of its encoder's latent and two noises per member. The exported graph
forms every member's noisy latent from them (`difftap.engine.torch_model.noisy_latent`):

    ``latent = signal * (mean + std * posterior_noise) + sigma * noise``

A backbone without one is fed the image.

Noise depends only on (seed, image, member). Each ensemble member of each image has its own counter-based stream (Philox
4x64-10, Salmon et al., SC 2011), keyed by a hash of the recipe's seed, the image's content and the member's number. So
features do not depend on the batch size, the order, the other images, or the number of workers.

Antithetic members come in pairs: the second member has the first one's posterior and diffusion noise with the opposite
sign. Each member alone is standard normal as before, so the expectation over members is the same; the part of a feature
that is odd in the noise cancels within the pair (Hammersley and Morton, 1956).

Axis letters are those of `difftap.engine.backend`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint, NoiseRule
from difftap.engine.backend import Array, Value
from difftap.engine.graph import Graph, Profile
from difftap.errors import InputError
from difftap.recipe import Recipe

__all__ = ["draw", "draw_noise", "example_feeds", "latent_feeds", "network_feeds", "scales"]


def draw(
    seed: int, digest: str, members: int, shape: tuple[int, int, int], antithetic: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw standard normal noise for every ensemble member of one image.

    Args:
        seed: the recipe's.
        digest: the image's identity, `difftap.images.Image.digest`.
        members: E.
        shape: ``(C, h, w)`` of the latent.
        antithetic: member 2k + 1 gets the negative of member 2k's noise; even members are as without it.

    Returns:
        the posterior's noise and the diffusion noise, each float32 ``(E, C, h, w)``. A member's noise does not depend
        on E.
    """
    both = np.empty((2, members, *shape), np.float32)
    for member in range(members):
        if antithetic and member % 2:
            np.negative(both[:, member - 1], out=both[:, member])
            continue
        # This text, and the order of the two draws, must never change: features in stores were made with them.
        key = hashlib.sha256(f"difftap-noise-1:{seed}:{digest}:{member}".encode()).digest()[:16]
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
        both[0, member] = stream.standard_normal(shape, np.float32)
        both[1, member] = stream.standard_normal(shape, np.float32)
    return both[0], both[1]


def draw_noise(recipe: Recipe, digests: Sequence[str], shape: tuple[int, ...], members: int) -> NDArray[np.float32]:
    """Draw the posterior's noise and the diffusion noise of the first members of each image: ``(2, B, E, C, h, w)``.

    Args:
        recipe: its seed and kind of noise; with noise ``none`` both are zero.
        digests: the images' identities.
        shape: ``(C, h, w)`` of the latent.
        members: E; may be fewer than the recipe's.
    """
    latent = (shape[0], shape[1], shape[2])
    if recipe.noise == "none":
        return np.zeros((2, len(digests), members, *latent), np.float32)
    pairs = recipe.noise == "antithetic"
    draws = [draw(recipe.seed, digest, members, latent, pairs) for digest in digests]
    both = np.stack([np.stack(pair) for pair in zip(*draws, strict=True)])
    if recipe.posterior == "image":  # one sample of the latent, to which every member adds its own noise
        both[0] = both[0, :, :1]
    return both


def scales(rule: NoiseRule, timestep: int, noise: str) -> tuple[float, float]:
    """Compute signal and sigma, the factors of the latent and of the noise at a timestep (see `NoiseRule`).

    Args:
        rule: the backbone's.
        timestep: counted from 0, which has the least noise.
        noise: the recipe's kind of noise.

    Raises:
        InputError: the schedule has no such timestep.
    """
    if noise == "none":  # a clean latent, as in CleanDIFT; the timestep is still an input of the network
        return rule.scaling_factor, 0.0
    schedule = rule.alphas_cumprod
    if not 0 <= timestep < len(schedule):
        raise InputError(f"timestep is {timestep}; allowed: 0 to {len(schedule) - 1}, the model's schedule")
    alpha = float(schedule[timestep])
    return alpha**0.5 * rule.scaling_factor, (1.0 - alpha) ** 0.5


def latent_feeds(
    rule: NoiseRule, timestep: int, noise: str, posterior: Mapping[str, Value], noises: NDArray[np.float32]
) -> dict[str, Value]:
    """Make the feeds from which the graph forms the noisy latents of a batch of images, and their timesteps.

    Args:
        rule: the backbone's.
        timestep: the same for all images.
        noise: the recipe's kind of noise.
        posterior: the encoder's ``mean`` and ``std``, each ``(B, C, h, w)``.
        noises: from `draw_noise`, ``(2, B, E, C, h, w)``.
    """
    count = noises.shape[1]
    signal, sigma = scales(rule, timestep, noise)
    return {
        "mean": posterior["mean"],
        "std": posterior["std"],
        "posterior_noise": noises[0],
        "noise": noises[1],
        "signal": np.full(count, signal, np.float32),
        "sigma": np.full(count, sigma, np.float32),
        "timestep": np.full(count, timestep, np.int64),
    }


def network_feeds(
    checkpoint: Checkpoint,
    timestep: int,
    noise: str,
    given: Mapping[str, Value],
    noises: NDArray[np.float32] | None,
    prompt: NDArray[np.float32],
) -> dict[str, Value]:
    """Make all feeds of a tapped network for a batch of images: an array for each of its `network_inputs`.

    Args:
        checkpoint: the network's.
        timestep: the same for all images; ignored if there is no noise rule.
        noise: the recipe's kind of noise.
        given: the encoder's posterior (see `latent_feeds`), or ``image``, ``(B, 3, H, W)``.
        noises: from `draw_noise`; None if there is no noise rule.
        prompt: the same for all images, ``(T, D)``; ignored if the network takes none.
    """
    rule = checkpoint.noise_rule
    if rule is None or noises is None:
        feeds = {"image": given["image"]}
    else:
        feeds = latent_feeds(rule, timestep, noise, given, noises)
    if checkpoint.prompt_width:  # the graph takes a prompt per image
        feeds["prompt"] = np.repeat(prompt[None], next(iter(feeds.values())).shape[0], axis=0)
    return feeds


def example_feeds(graph: Graph, profile: Profile, seed: int = 0) -> dict[str, Array]:
    """Make seeded random feeds for a graph, with the variance of real ones, to measure speed or exactness with."""
    rng = np.random.default_rng(seed)
    sides = {"B": profile.batch, **profile.axes(graph.model)}
    rule = graph.model.noise_rule
    constants, spread = {}, 1.0
    if rule is not None:
        signal, sigma = scales(rule, min(261, len(rule.alphas_cumprod) - 1), "independent")  # DIFT's timestep
        constants = {"signal": signal, "sigma": sigma}
        spread = 1 / rule.scaling_factor  # the standard deviation of a latent before scaling
    feeds: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = tuple(sides[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if spec.dtype == "int64":
            feeds[spec.name] = np.full(shape, 261, np.int64)
        elif spec.name in constants:
            feeds[spec.name] = np.full(shape, constants[spec.name], np.float32)
        elif spec.name == "image":
            feeds[spec.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        elif spec.name == "std":
            feeds[spec.name] = rng.uniform(0, 0.1, shape).astype(np.float32)
        else:
            width = spread if spec.name == "mean" else 1.0
            feeds[spec.name] = (width * rng.standard_normal(shape)).astype(np.float32)
    return feeds
