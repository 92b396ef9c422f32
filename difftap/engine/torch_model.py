"""The two networks as torch modules: what the torch backend runs and what the export step traces.

Taps are read with forward hooks on diffusers' own modules; no forward pass is copied. Axis letters as in
`difftap.engine.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from difftap.backbones.checkpoint import Checkpoint
from difftap.errors import ModelError, RecipeError, first_line, require

__all__ = ["TappedUNet", "VAEEncoder", "build"]


class _Stop(Exception):  # noqa: N818 - a signal, no error
    """Raised by the last tap's hook to end an eager pass: what follows feeds no tap."""


class VAEEncoder(nn.Module):  # type: ignore[misc]
    """Image to the posterior of its latent."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, H, W)`` in [-1, 1] to mean and standard deviation, each ``(B, C, h, w)``."""
        posterior = self.vae.encode(image, return_dict=False)[0]
        return posterior.mean, posterior.std


class TappedUNet(nn.Module):  # type: ignore[misc]
    """A UNet that returns the ensemble mean of its taps.

    Args:
        unet: a ``UNet2DConditionModel``.
        taps: ``(name, module path)`` of each tap, in the order of the outputs.
        stop_early: end the pass once every tap is there (eager runs); a traced pass must run on, and loses its dead
            tail when it is exported.
        pooled: width of the pooled text embedding in the prompt's last row; 0 where there is none.
        latent_stride: image pixels per latent cell.
    """

    def __init__(
        self,
        unet: nn.Module,
        taps: Sequence[tuple[str, str]],
        stop_early: bool,
        pooled: int = 0,
        latent_stride: int = 8,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.pooled = pooled
        self.latent_stride = latent_stride
        self.taps = tuple(taps)
        self.stop_early = stop_early

    def forward(
        self,
        mean: Tensor,
        std: Tensor,
        posterior_noise: Tensor,
        noise: Tensor,
        signal: Tensor,
        sigma: Tensor,
        timestep: Tensor,
        prompt: Tensor,
    ) -> tuple[Tensor, ...]:
        """Feeds as in `difftap.engine.backend.unet_inputs`; gives ``(B, C, h, w)`` per tap."""
        batch, members = noise.shape[:2]
        latent = mean.unsqueeze(1) + std.unsqueeze(1) * posterior_noise  # (B, E, C, h, w)
        latent = signal.view(-1, 1, 1, 1, 1) * latent + sigma.view(-1, 1, 1, 1, 1) * noise
        values = self.members(
            latent.flatten(0, 1),  # (B*E, C, h, w)
            timestep.unsqueeze(1).expand(batch, members).flatten(0, 1),
            prompt.unsqueeze(1).expand(-1, members, -1, -1).flatten(0, 1),
        )
        return tuple(value.unflatten(0, (batch, members)).mean(1) for value in values)

    def members(self, latent: Tensor, timestep: Tensor, prompt: Tensor) -> list[Tensor]:
        """Noisy latents ``(E, C, h, w)``, timesteps ``(E,)`` and prompts ``(E, T, D)`` to every member's taps."""
        caught: dict[str, Tensor] = {}
        handles = []
        paths = list(dict.fromkeys(path for _, path in self.taps))  # two names may mean one module
        for path in paths:

            def catch(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
                # Blocks that feed skip connections return (hidden, skips); attention returns (hidden,).
                caught[path] = output[0] if isinstance(output, tuple | list) else output
                if self.stop_early and len(caught) == len(paths):
                    raise _Stop

            handles.append(self.unet.get_submodule(path).register_forward_hook(catch))
        try:
            prompt, added = self._conditions(latent, prompt)
            self.unet(latent, timestep, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for name, path in self.taps:
            shape = tuple(caught[path].shape) if isinstance(caught.get(path), Tensor) else None
            if shape is None or len(shape) != 4:
                got = "is not run, or gives no tensor" if shape is None else f"gives a tensor of {len(shape)} axes"
                raise RecipeError(
                    f"tap '{name}' cannot be read: module '{path}' {got}; allowed: a module that gives a map "
                    "(B, C, h, w), such as a block, a residual or an attention layer"
                )
        return [caught[path] for _, path in self.taps]

    def _conditions(self, latent: Tensor, prompt: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Take SDXL's pooled embedding out of the prompt, and add its sizes: the image whole and uncropped.

        The six numbers are original height and width, the crop's top and left, and target height and width.
        """
        if not self.pooled:
            return prompt, None
        height, width = (side * self.latent_stride for side in latent.shape[-2:])
        ones = torch.ones_like(prompt[:, -1, :1])  # (N, 1): sides may be symbolic while tracing
        sizes = torch.cat([ones * height, ones * width, ones * 0, ones * 0, ones * height, ones * width], dim=1)
        return prompt[:, :-1], {"text_embeds": prompt[:, -1, : self.pooled], "time_ids": sizes}


def _load(model: Checkpoint, component: str) -> nn.Module:
    """Load one component in fp32 with diffusers; safetensors only, nothing from the network."""
    diffusers = require("diffusers", "export", "loading a checkpoint with torch")
    kind = diffusers.UNet2DConditionModel if component == "unet" else diffusers.AutoencoderKL
    files = model.weight_files(component)
    variant = "fp16" if files[0].name.endswith(".fp16.safetensors") else None
    try:
        loaded = kind.from_pretrained(
            str(model.folder),
            subfolder=component,
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the {component} in '{model.folder}' cannot be loaded ({first_line(error)})") from error
    module: nn.Module = loaded.eval().requires_grad_(False)
    return module


def build(model: Checkpoint, component: str, tap_names: Sequence[str] = (), *, stop_early: bool = False) -> nn.Module:
    """Load one network of a model as the module whose inputs and outputs the graph has.

    Raises:
        RecipeError: a tap does not exist in this UNet. (One that exists and gives no map is refused when it is run.)
        ModelError: the checkpoint cannot be loaded.
    """
    taps = [model.tap(name) for name in tap_names]
    network = _load(model, component)
    if component == "vae":
        return VAEEncoder(network).eval()
    for tap in taps:
        try:
            network.get_submodule(tap.module)
        except AttributeError as error:
            raise ModelError(
                f"the UNet in '{model.folder}' has no module '{tap.module}' for tap '{tap.name}'"
            ) from error
    named = [(tap.name, tap.module) for tap in taps]
    return TappedUNet(network, named, stop_early, model.pooled_width, model.latent_stride).eval()
