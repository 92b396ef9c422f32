"""Run UNet passes that carry gradients back to the prompt: one pass per branch, ended after the branch's deepest tap.

Axis letters: B images; T prompt tokens; D their width; C channels; h w cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from difftap.backbones.sd_unet import SDUNet
from difftap.engine.noise import latent_feeds
from difftap.recipe import Recipe
from difftap.tuning.posteriors import ImagePosterior

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

__all__ = ["TappedUNet"]


class TappedUNet:
    """A model's UNet, frozen, tapped for each branch of a recipe.

    Args:
        model: the checkpoint.
        recipe: gives the branches' taps and the noise.
        timesteps: one per branch.
        device: where the UNet runs.
        precision: ``fp32``, or ``bf16`` for autocast.
        checkpointing: recompute layers in the backward pass, which takes less memory and more time.
        unet: the UNet, if it is loaded already.

    Attributes:
        unet: the frozen UNet.
        stride: image pixels per latent cell.
    """

    def __init__(
        self,
        model: SDUNet,
        recipe: Recipe,
        timesteps: Sequence[int],
        device: str,
        *,
        precision: str = "fp32",
        checkpointing: bool = False,
        unet: torch.nn.Module | None = None,
    ) -> None:
        from difftap.engine.torch_model import NoisyModule, build

        self.unet = unet if unet is not None else build(model, "unet").network.to(device)
        if checkpointing:
            cast("UNet2DConditionModel", self.unet).enable_gradient_checkpointing()
        self.stride = model.latent_stride
        self._rule = model.noise_rule
        self._noise = recipe.noise
        self._timesteps = tuple(timesteps)
        self._device = device
        self._precision = precision
        self._nets = []
        for branch in recipe.branches:
            taps = [(name, model.tap(name).module) for name in branch.taps]
            # Checkpointing recomputes whole blocks. A pass that stopped inside a block could not be recomputed.
            whole = all("." not in path.removeprefix("mid_block").split("blocks.")[-1] for _, path in taps)
            self._nets.append(NoisyModule(model, self.unet, taps, stop_early=whole or not checkpointing).eval())

    def run(self, branch: int, images: Sequence[ImagePosterior], prompts: torch.Tensor) -> list[list[torch.Tensor]]:
        """Run one branch.

        Args:
            branch: its number.
            images: the posteriors and noises of B images.
            prompts: ``(B, T, D)``, one for each image.

        Returns:
            for each image its maps ``(C, h, w)``, one per tap of the branch, in the prompts' number type.
        """
        import torch

        count = len(images)
        posterior = {name: np.stack([getattr(one, name) for one in images]) for name in ("mean", "std")}
        noises = np.stack([np.stack([one.posterior_noise, one.noise]) for one in images], axis=1)  # (2, B, 1, C, h, w)
        arrays = latent_feeds(self._rule, self._timesteps[branch], self._noise, posterior, noises)
        feeds = {name: torch.from_numpy(np.asarray(array)).to(self._device) for name, array in arrays.items()}
        feeds = {name: one.to(prompts.dtype) if one.is_floating_point() else one for name, one in feeds.items()}
        mixed = torch.autocast(self._device.split(":")[0], torch.bfloat16) if self._precision == "bf16" else None
        with mixed or contextlib.nullcontext():
            values = self._nets[branch](**feeds, prompt=prompts)
        wide = prompts.dtype  # autocast gives bf16, in which the loss would lose digits
        return [[value[k].to(wide) for value in values] for k in range(count)]
