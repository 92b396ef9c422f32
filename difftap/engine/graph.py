"""What an engine is made of, in words: graphs and their tensors, and the profile of shapes and precision.

Axis letters: B batch of images, E ensemble members, C channels, H W image pixels, h w cells, T prompt tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Size
from difftap.errors import InputError
from difftap.taps import deepest
from difftap.tensorspec import TensorSpec

__all__ = [
    "CALIBRATED",
    "PRECISIONS",
    "VAE_INPUTS",
    "Array",
    "Graph",
    "Profile",
    "unet_inputs",
    "vae_outputs",
]

Array = NDArray[Any]

PRECISIONS = ("fp32", "bf16x3", "fp16", "bf16", "int8", "fp8")
"""What an engine computes in; inputs and outputs are float32 in all of them."""

CALIBRATED = ("int8", "fp8")
"""Precisions whose ranges are measured on images when an engine is built."""


@dataclass(frozen=True)
class Graph:
    """One exported network: the VAE encoder, or a UNet cut after its deepest tap.

    Attributes:
        model: the checkpoint it comes from.
        component: ``vae`` or ``unet``.
        taps: names of the tapped tensors, the UNet graph's outputs; empty for the VAE.
        path: the ONNX file; None where it has not been exported (the torch backend needs none).
        precision: the types inside: ``fp32`` as exported, or the half type of a variant (`difftap.export.variants`).
        takes: inputs of a small network beside the backbone's (a text encoder, a conditional head); none for the
            inputs that follow from the checkpoint.
        gives: outputs of such a network.
    """

    model: Checkpoint
    component: str
    taps: tuple[str, ...] = ()
    path: Path | None = None
    precision: str = "fp32"
    takes: tuple[TensorSpec, ...] = ()
    gives: tuple[TensorSpec, ...] = ()

    @property
    def name(self) -> str:
        """The file's stem: ``vae``, or ``unet.`` and the taps; then the types inside, if they are not float32."""
        kind = [self.precision] if self.precision != "fp32" else []
        return ".".join([self.component, *(["+".join(self.taps)] if self.taps else []), *kind])

    @property
    def cut(self) -> str | None:
        """The tap that the network finishes last, after which it is cut; None for the VAE."""
        if not self.taps:
            return None
        return deepest([self.model.tap(name) for name in self.taps], self.model.unet).name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the network is fed."""
        if self.takes:
            return self.takes
        return VAE_INPUTS if self.component == "vae" else unet_inputs(self.model)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives."""
        if self.gives:
            return self.gives
        if self.component == "vae":
            return vae_outputs(self.model)
        taps = [self.model.tap(name) for name in self.taps]
        return tuple(
            TensorSpec(tap.name, "float32", ("B", tap.channels or f"C{i}", f"h{i}", f"w{i}"))
            for i, tap in enumerate(taps)
        )


VAE_INPUTS = (TensorSpec("image", "float32", ("B", 3, "H", "W")),)


def vae_outputs(model: Checkpoint) -> tuple[TensorSpec, ...]:
    """The posterior's mean and standard deviation, before the scaling factor."""
    shape = ("B", model.latent_channels, "h", "w")
    return (TensorSpec("mean", "float32", shape), TensorSpec("std", "float32", shape))


def unet_inputs(model: Checkpoint) -> tuple[TensorSpec, ...]:
    """What a tapped UNet is fed, per image; the graph forms every member's noisy latent itself.

    ``latent = signal * (mean + std * posterior_noise) + sigma * noise``, where ``signal`` is the square root of the
    schedule's cumulative alpha times the VAE's scaling factor and ``sigma`` the square root of one minus it. For SDXL
    the prompt's last row is the pooled text embedding, filled up with zeros; its sizes are those of the input.
    """
    posterior: tuple[int | str, ...] = ("B", model.latent_channels, "h", "w")
    members: tuple[int | str, ...] = ("B", "E", model.latent_channels, "h", "w")
    return (
        TensorSpec("mean", "float32", posterior),
        TensorSpec("std", "float32", posterior),
        TensorSpec("posterior_noise", "float32", members),
        TensorSpec("noise", "float32", members),
        TensorSpec("signal", "float32", ("B",)),
        TensorSpec("sigma", "float32", ("B",)),
        TensorSpec("timestep", "int64", ("B",)),
        TensorSpec("prompt", "float32", ("B", "T", model.prompt_width)),
    )


@dataclass(frozen=True)
class Profile:
    """The shapes and the precision an engine is made for.

    Attributes:
        size: the network's input, ``(W, H)`` in pixels.
        ensemble: members per image, E.
        tokens: prompt tokens, T.
        batch: most images in one run, B.
        precision: what the engine computes in, one of `PRECISIONS`.
    """

    size: Size
    ensemble: int = 1
    tokens: int = 1
    batch: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision is '{self.precision}'; allowed: {', '.join(PRECISIONS)}")

    def axes(self, model: Checkpoint) -> dict[str, int]:
        """How long the lettered axes are that a profile fixes: all but B."""
        width, height = self.size
        stride = model.latent_stride
        cells = {"h": height // stride, "w": width // stride}
        return {"E": self.ensemble, "T": self.tokens, "H": height, "W": width, **cells}

    @property
    def label(self) -> str:
        """For file names and messages: ``256x256.e4.t77.b1.fp32``."""
        width, height = self.size
        return f"{width}x{height}.e{self.ensemble}.t{self.tokens}.b{self.batch}.{self.precision}"
