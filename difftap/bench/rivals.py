"""Rivals: the ways people extract these features in torch today, which `difftap bench throughput` compares with ours.

``dift`` follows the published code of DIFT (Tang et al., NeurIPS 2023): the image is repeated E times, every copy goes
through the VAE encoder and samples the posterior, noise is added, and one UNet pass of E members stops after the tap.
``dift-tuned`` is what a careful user makes of it: the VAE runs once per image, both networks use the memory layout
channels-last and are compiled by ``torch.compile``, and the UNet has nothing after the tap.

Both get the noise that ours draws, so that their features can be compared with ours; drawing it is not timed. Axis
letters are those of `difftap.engine.backend`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.sd_unet import SDUNet
from difftap.coords import Size
from difftap.engine.noise import scales
from difftap.errors import BackendError, first_line, require
from difftap.featuremap import FeatureMap
from difftap.machine import available_memory
from difftap.recipe import Branch, Recipe

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor
    from torch.nn import Module

__all__ = ["Rival", "slow_way", "vae_bytes"]

_LIVE = 5
"""The VAE's first level holds about this many activations in memory at once; they are the largest."""
_SHARE = 0.8
"""One batch may be expected to take at most this share of the free memory."""


def vae_bytes(model: SDUNet, size: Size, images: int, width: int = 4) -> int:
    """Estimate the bytes that encoding a batch takes besides the weights.

    Args:
        model: the checkpoint.
        size: ``(W, H)`` of the input.
        images: images of the batch.
        width: bytes per number.
    """
    return _LIVE * images * size[0] * size[1] * int(model.vae["block_out_channels"][0]) * width


class Rival:
    """One rival, ready to run.

    Args:
        model: the checkpoint.
        recipe: the features to extract; its noise must not be ``none``.
        prompts: the prompt of each branch, ``(T, D)`` float32.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        tuned: make ``dift-tuned`` instead of ``dift``.
        compiled: compile the tuned one; tests do without, to save time.

    Attributes:
        together: members in one batch: E, or fewer if E do not fit in memory.
        notes: differences from the published way, for the report.

    Raises:
        BackendError: the model is no Stable Diffusion UNet, or the tap is no decoder block (``dift-tuned``).
        MissingExtraError: torch or diffusers is not installed.
    """

    def __init__(
        self,
        model: Checkpoint,
        recipe: Recipe,
        prompts: Sequence[NDArray[np.float32]],
        device: str,
        precision: str = "fp32",
        *,
        tuned: bool = False,
        compiled: bool = True,
    ) -> None:
        self._torch = require("torch", "bench", "running DIFT's way")
        require("diffusers", "export", "running DIFT's way")
        from difftap.engine.torch_model import build

        torch = self._torch
        if not isinstance(model, SDUNet):
            raise BackendError(f"DIFT's way is Stable Diffusion's; got model '{model.name}'; allowed: SD's UNets")
        self.rule = model.noise_rule
        self._model, self._recipe, self._device, self._tuned = model, recipe, device, tuned
        self._kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._layout = torch.channels_last if tuned else torch.contiguous_format
        self.notes: list[str] = []
        if device == "cuda":  # TF32 would round fp32 products to about 10 bits
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        encoder = build(model, "vae")
        self._encode: Any = encoder.to(device, self._kind, memory_format=self._layout)  # type: ignore[call-overload]  # unknown to torch's stub
        self._networks = []
        cut: dict[tuple[str, ...], Any] = {}
        for branch in recipe.branches:
            if branch.taps not in cut:
                network = build(model, "unet", branch.taps, stop_early=True)
                network.to(device, self._kind, memory_format=self._layout)  # type: ignore[call-overload]  # unknown to torch's stub
                cut[branch.taps] = _whole(_cut_after(network.network, branch), compiled) if tuned else network.members
            self._networks.append(cut[branch.taps])
        if tuned and compiled:
            self._encode = torch.compile(encoder, dynamic=False)
        self._prompts = [torch.from_numpy(prompt).to(device, self._kind) for prompt in prompts]
        self.together = recipe.ensemble if tuned else self._fitting()

    def _fitting(self) -> int:
        """Give the number of members that go through the VAE at once: all, or a divisor of E that should fit."""
        members, width = self._recipe.ensemble, 4 if self._kind == self._torch.float32 else 2
        free = self._torch.cuda.mem_get_info()[0] if self._device == "cuda" else available_memory()
        fits = [
            d
            for d in range(1, members + 1)
            if members % d == 0 and vae_bytes(self._model, self._recipe.size, d, width) <= _SHARE * free
        ]
        together = max(fits, default=1)
        if together < members:
            self.notes.append(f"{together} of {members} members at a time: more do not fit into memory")
        return together

    def warm_up(self, batch: int = 1) -> None:
        """Run both networks once with few members, to load all weights.

        The compiled networks must be run with the shapes of later calls, because they are compiled for them.
        """
        count = self._recipe.ensemble if self._tuned else 1
        images = batch if self._tuned else 1
        width, height = self._recipe.size
        pixels = np.zeros((images, 3, height, width), np.float32)
        latent = (images, count, *self.rule.latent_shape(self._recipe.size))
        noises = np.random.default_rng(0).standard_normal((2, *latent), np.float32)
        self.extract(pixels, noises, members=count)

    def extract(
        self, pixels: NDArray[np.float32], noises: NDArray[np.float32], members: int | None = None
    ) -> tuple[list[dict[str, NDArray[np.float32]]], dict[str, float]]:
        """Extract the features of a batch, and time the networks.

        Args:
            pixels: ``(B, 3, H, W)`` in [-1, 1].
            noises: posterior and diffusion noise, ``(2, B, E, C, h, w)``.
            members: fewer members than the recipe's, for the warm-up.

        Returns:
            the maps ``(B, C, h, w)`` of each branch by tap; and the seconds in ``vae`` and ``unet``.

        Raises:
            BackendError: torch fails, for lack of memory for example.
        """
        torch = self._torch
        clock = {"vae": 0.0, "unet": 0.0}
        count = members or self._recipe.ensemble
        maps: list[dict[str, NDArray[np.float32]]] = []
        try:
            with torch.inference_mode():
                image = torch.from_numpy(pixels).to(self._device, self._kind, memory_format=self._layout)
                drawn = torch.from_numpy(noises).to(self._device, self._kind)
                posterior = self._posterior(image, clock) if self._tuned else None
                for branch, network, prompt in zip(self._recipe.branches, self._networks, self._prompts, strict=True):
                    if posterior is None:
                        one = [
                            self._published(image[i], drawn[:, i], branch, network, prompt, count, clock)
                            for i in range(len(image))
                        ]
                        values = [torch.stack(tensors) for tensors in zip(*one, strict=True)]
                    else:
                        values = self._batched(posterior, drawn, branch, network, prompt, clock)
                    maps.append({tap: v.float().cpu().numpy() for tap, v in zip(branch.taps, values, strict=True)})
        except RuntimeError as error:  # out of memory, or an error of torch's compiler
            raise BackendError(f"torch failed on DIFT's way: {first_line(error)}") from error
        return maps, clock

    def _posterior(self, image: Tensor, clock: dict[str, float]) -> tuple[Tensor, Tensor]:
        start = self._now()
        mean, std = self._encode(image)
        clock["vae"] += self._now() - start
        return mean, std

    def _published(
        self,
        image: Tensor,
        drawn: Tensor,
        branch: Branch,
        network: Callable[..., list[Tensor]],
        prompt: Tensor,
        count: int,
        clock: dict[str, float],
    ) -> list[Tensor]:
        """Extract one image ``(3, H, W)`` like the published code: it is repeated for every member from the start."""
        torch = self._torch
        signal, sigma = scales(self.rule, branch.timestep, self._recipe.noise)
        sums: list[Tensor] = []
        step = min(self.together, count)
        for first in range(0, count, step):
            part = slice(first, first + step)
            mean, std = self._posterior(image.unsqueeze(0).repeat(step, 1, 1, 1), clock)
            start = self._now()
            # Written out here, not taken from difftap.engine.noise: the published code's way is what is measured.
            latent = signal * (mean + std * drawn[0, part]) + sigma * drawn[1, part]  # (E, C, h, w)
            steps = torch.full((step,), branch.timestep, device=self._device)
            values = network(latent, steps, prompt.expand(step, -1, -1))
            totals = [value.sum(0) for value in values]
            sums = [a + b for a, b in zip(sums, totals, strict=True)] if sums else totals
            clock["unet"] += self._now() - start
        return [total / count for total in sums]

    def _batched(
        self,
        posterior: tuple[Tensor, Tensor],
        drawn: Tensor,
        branch: Branch,
        network: Callable[..., list[Tensor]],
        prompt: Tensor,
        clock: dict[str, float],
    ) -> list[Tensor]:
        """Run a batch of encoded images, with all members of all images in one pass."""
        torch = self._torch
        start = self._now()
        signal, sigma = scales(self.rule, branch.timestep, self._recipe.noise)
        mean, std = (value.unsqueeze(1) for value in posterior)  # (B, 1, C, h, w)
        latent = (signal * (mean + std * drawn[0]) + sigma * drawn[1]).flatten(0, 1)
        latent = latent.contiguous(memory_format=self._layout)
        steps = torch.full((len(latent),), branch.timestep, device=self._device)
        values = network(latent, steps, prompt.expand(len(latent), -1, -1).contiguous())
        means = [value.unflatten(0, drawn.shape[1:3]).mean(1) for value in values]
        clock["unet"] += self._now() - start
        return means

    def _now(self) -> float:
        if self._device == "cuda":  # a GPU works in the background: wait until it is done
            self._torch.cuda.synchronize()
        return time.perf_counter()


def _cut_after(unet: UNet2DConditionModel, branch: Branch) -> UNet2DConditionModel:
    """Remove everything after a decoder block from a UNet; a compiled pass cannot be stopped early.

    Raises:
        BackendError: the tap is not a decoder block's output.
    """
    from torch import nn

    block = re.fullmatch(r"up(\d+)", branch.taps[0])
    if len(branch.taps) != 1 or block is None:
        raise BackendError(
            f"dift-tuned ends with a decoder block; got taps {', '.join(branch.taps)}; allowed: one of up0, up1, ..."
        )
    unet.up_blocks = unet.up_blocks[: int(block[1]) + 1]
    unet.conv_norm_out, unet.conv_out = None, nn.Identity()
    return unet


def _whole(unet: Module, compiled: bool) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
    """Make a function that runs a cut UNet, whose output is the tap itself."""
    run = require("torch", "bench", "running DIFT's way").compile(unet, dynamic=False) if compiled else unet

    def members(latent: Tensor, timestep: Tensor, prompt: Tensor) -> list[Tensor]:
        return [run(latent, timestep, encoder_hidden_states=prompt, return_dict=False)[0]]

    return members


def slow_way(
    source: FeatureMap, target: FeatureMap, points: NDArray[np.int64], interpolation: str, once: bool
) -> NDArray[np.float64]:
    """Match like DIFT's evaluation, in torch and float32: both maps are enlarged to image size and searched.

    Args:
        source: the map of the image with the points.
        target: the map to search.
        points: whole pixels ``(N, 2)``, x and y.
        interpolation: ``bilinear`` or ``bicubic``.
        once: normalise the enlarged target once for all points, which is the fairer rival, instead of for each point.

    Returns:
        pixels ``(N, 2)``, x and y.
    """
    # The channels stay first. Other code normalises the map transposed to (H W, C), which is no faster.
    torch = require("torch", "bench", "comparing with the slow way")
    functional = torch.nn.functional
    maps = []
    for features in (source, target):
        width, height = features.image_size
        data = torch.from_numpy(features.data)[None]
        maps.append(functional.interpolate(data, size=(height, width), mode=interpolation, align_corners=False)[0])
    near, far = maps[0], maps[1].flatten(1)  # (C, H, W), (C, H W)
    if once:
        far = functional.normalize(far, dim=0)
    width = target.image_size[0]
    found = np.empty((len(points), 2))
    for n, (x, y) in enumerate(points):
        vector = functional.normalize(near[:, y, x], dim=0)
        pixels = far if once else functional.normalize(far, dim=0)
        found[n] = divmod(int(torch.argmax(vector @ pixels)), width)[::-1]
    return found
