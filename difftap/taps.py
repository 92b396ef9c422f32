"""Taps: the intermediate tensors of a UNet that difftap can read, by name.

A tap is data: a short name, the module whose output it is, how many channels that has, and how many image pixels one
of its cells spans. Short names follow the blocks of a diffusers ``UNet2DConditionModel``:

=================  ==================================  ==========================================
name               module path                         what it is
=================  ==================================  ==========================================
``down{i}``        ``down_blocks.{i}``                 an encoder block, *with* its downsampler
``mid``            ``mid_block``                       the middle block
``up{i}``          ``up_blocks.{i}``                   a decoder block, *with* its upsampler; what
                                                       DIFT calls index ``i``
``down2.attn0``    ``down_blocks.2.attentions.0``      one attention layer, in any block
``down2.res0``     ``down_blocks.2.resnets.0``         one residual layer, in any block
=================  ==================================  ==========================================

Any other module path inside those blocks that gives a map (``up_blocks.1.resnets.0.conv1``) works too; its channels and
stride are found when it is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difftap.errors import RecipeError

__all__ = ["Tap", "deepest", "depth", "named_taps", "resolve"]

LATENT_STRIDE = 8
"""Image pixels per latent cell when a VAE's config does not say otherwise (Stable Diffusion's)."""

_PATH = re.compile(r"^(?P<block>(?:down_blocks|up_blocks)\.\d+|mid_block)(?:\.[A-Za-z_0-9]+)*$")


@dataclass(frozen=True)
class Tap:
    """One intermediate tensor of a UNet.

    Attributes:
        name: the name it was asked for by, also the name of the graph's output.
        module: path of the module whose output it is.
        channels: C of its ``(B, C, h, w)`` output; 0 where only running the network can tell.
        stride: image pixels per cell; 0 where only running the network can tell.
    """

    name: str
    module: str
    channels: int
    stride: int


def named_taps(unet: Mapping[str, Any], latent_stride: int = LATENT_STRIDE) -> tuple[Tap, ...]:
    """Every block and layer of a UNet that has a short name, in the order in which the network runs them.

    Args:
        unet: the UNet's ``config.json``.
        latent_stride: image pixels per latent cell.
    """
    widths = [int(width) for width in unet["block_out_channels"]]
    down_types, up_types = list(unet["down_block_types"]), list(unet["up_block_types"])
    layers = unet.get("layers_per_block", 2)
    per_block = [int(n) for n in layers] if isinstance(layers, Sequence) else [int(layers)] * len(widths)
    taps: list[Tap] = []
    stride = latent_stride

    def add_block(name: str, path: str, kind: str, count: int, width: int, inner: int, outer: int) -> None:
        for layer in range(count):
            taps.append(Tap(f"{name}.res{layer}", f"{path}.resnets.{layer}", width, inner))
            if "CrossAttn" in kind or "AttnDown" in kind or "AttnUp" in kind:
                taps.append(Tap(f"{name}.attn{layer}", f"{path}.attentions.{layer}", width, inner))
        taps.append(Tap(name, path, width, outer))

    for i, (kind, width) in enumerate(zip(down_types, widths, strict=True)):
        outer = stride if i == len(widths) - 1 else stride * 2
        add_block(f"down{i}", f"down_blocks.{i}", kind, per_block[i], width, stride, outer)
        stride = outer
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        taps.append(Tap("mid", "mid_block", widths[-1], stride))
    for i, (kind, width) in enumerate(zip(up_types, reversed(widths), strict=True)):
        outer = stride if i == len(widths) - 1 else stride // 2
        add_block(f"up{i}", f"up_blocks.{i}", kind, per_block[-1 - i] + 1, width, stride, outer)
        stride = outer
    return tuple(taps)


def resolve(name: str, unet: Mapping[str, Any], latent_stride: int = LATENT_STRIDE) -> Tap:
    """Find a tap by its short name or module path.

    Raises:
        RecipeError: the name fits no block or layer of this UNet; the message lists those that exist.
    """
    known = named_taps(unet, latent_stride)
    for tap in known:
        if name == tap.name:
            return tap
        if name == tap.module:
            return Tap(name, tap.module, tap.channels, tap.stride)
    path = _PATH.match(name)
    if path and any(tap.module == path["block"] for tap in known):
        return Tap(name, name, 0, 0)
    blocks = ", ".join(tap.name for tap in known if "." not in tap.name)
    raise RecipeError(
        f"no tap '{name}' in this UNet; its blocks are {blocks}; layers are written like 'down2.attn0' or 'up1.res0' "
        "('difftap taps --model M' lists them all), and a module path like 'up_blocks.1.attentions.0' works too"
    )


def depth(module: str, unet: Mapping[str, Any]) -> tuple[int, ...]:
    """A key that sorts module paths by when the network finishes them.

    Layers finish before the block that holds them; within a block, residual layer ``k`` comes before attention layer
    ``k``. Deeper paths sort with the layer that holds them.
    """
    downs = len(unet["down_block_types"])
    parts = module.split(".")
    if parts[0] == "mid_block":
        block, rest = downs, parts[1:]
    else:
        block, rest = int(parts[1]) + (0 if parts[0] == "down_blocks" else downs + 1), parts[2:]
    if not rest:
        return (block, 1, 0, 0)
    if len(rest) == 1 or rest[0] not in ("resnets", "attentions"):
        return (block, 0, 10**6, 0)  # a sampler, or a list of layers: after all of the block's layers
    return (block, 0, int(rest[1]), int(rest[0] == "attentions"))


def deepest(taps: Sequence[Tap], unet: Mapping[str, Any]) -> Tap:
    """The tap that the network finishes last: where the exported graph is cut."""
    return max(taps, key=lambda tap: depth(tap.module, unet))
