"""UNet passes that let gradients through to the prompt: one per branch, ended after the branch's deepest tap.

Axis letters: B images; T prompt tokens; D their width; C channels; h w cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import latent_scales
from difftap.recipe import Recipe
from difftap.tuning.posteriors import Known

if TYPE_CHECKING:
    import torch

__all__ = ["Passes"]


class Passes:
    """A model's UNet, frozen, tapped for each branch of a recipe.

    Args:
        model: the checkpoint.
        recipe: its branches' taps and its noise.
        timesteps: one a branch.
        device: where the UNet runs.
        precision: ``fp32``, or ``bf16`` for autocast.
        checkpointing: recompute layers in the backward pass.
        unet: the UNet, if it is loaded already.

    Attributes:
        unet: the frozen UNet.
        stride: image pixels per latent cell.
    """

    def __init__(
        self,
        model: Checkpoint,
        recipe: Recipe,
        timesteps: Sequence[int],
        device: str,
        *,
        precision: str = "fp32",
        checkpointing: bool = False,
        unet: torch.nn.Module | None = None,
    ) -> None:
        from difftap.engine.torch_model import TappedUNet, build

        self.unet = unet if unet is not None else build(model, "unet", recipe.branches[0].taps).unet.to(device)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.stride = model.latent_stride
        self._scales = [latent_scales(model, timestep, recipe.noise) for timestep in timesteps]
        self._timesteps = tuple(timesteps)
        self._device = device
        self._precision = precision
        self._nets = []
        for branch in recipe.branches:
            taps = [(name, model.tap(name).module) for name in branch.taps]
            # Recomputed layers must run to their end as they did the first time: a pass cut inside one could not.
            whole = all("." not in path.removeprefix("mid_block").split("blocks.")[-1] for _, path in taps)
            self._nets.append(TappedUNet(self.unet, taps, stop_early=whole or not checkpointing).eval())

    def run(self, branch: int, images: Sequence[Known], prompts: torch.Tensor) -> list[list[torch.Tensor]]:
        """Each image's maps ``(C, h, w)``, one a tap of the branch, in fp32; ``prompts`` is ``(B, T, D)``."""
        import torch

        signal, sigma = self._scales[branch]
        count = len(images)

        def stacked(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(one, name) for one in images])).to(self._device, prompts.dtype)

        feeds = [stacked(name) for name in ("mean", "std", "posterior_noise", "noise")]
        feeds += [torch.full((count,), value, device=self._device, dtype=prompts.dtype) for value in (signal, sigma)]
        timestep = torch.full((count,), self._timesteps[branch], device=self._device)
        mixed = torch.autocast(self._device.split(":")[0], torch.bfloat16) if self._precision == "bf16" else None
        with mixed or contextlib.nullcontext():
            values = self._nets[branch](*feeds, timestep, prompts)
        wide = prompts.dtype
        return [[value[k].to(wide) for value in values] for k in range(count)]
