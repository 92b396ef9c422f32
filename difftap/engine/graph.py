"""What an engine is made from: a graph with named inputs and outputs, and a profile of shapes and precision.

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
from difftap.tensorspec import TensorSpec

__all__ = [
    "CALIBRATED",
    "PRECISIONS",
    "Array",
    "Graph",
    "Profile",
    "network_inputs",
]

Array = NDArray[Any]
"""An input or output of an engine; its dtype and shape are in the graph's `TensorSpec` of the same name."""

PRECISIONS = ("fp32", "bf16x3", "fp16", "bf16", "int8", "fp8")
"""The types that an engine computes in. Inputs and outputs are float32 under all of them."""

CALIBRATED = ("int8", "fp8")
"""Precisions that need ranges measured on images when an engine is built."""


@dataclass(frozen=True)
class Graph:
    """One network to run: a backbone's encoder, or its tapped network cut after the deepest tap.

    Attributes:
        model: the checkpoint it comes from.
        component: one of the checkpoint's components: ``vae`` or ``unet`` for Stable Diffusion.
        taps: names of the tapped tensors, which are the graph's outputs; empty for the encoder.
        path: the ONNX file; None if it has not been exported (the torch backend needs none).
        precision: the types inside: ``fp32`` as exported, or the name of a variant (`difftap.export.variants`).
        takes: inputs of a network that is not the backbone's own (a text encoder, a conditional head); empty for the
            inputs that the checkpoint defines.
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
        """The file's stem: ``vae``, or ``unet.`` and the taps; then the precision, if it is not fp32."""
        kind = [self.precision] if self.precision != "fp32" else []
        return ".".join([self.component, *(["+".join(self.taps)] if self.taps else []), *kind])

    @property
    def cut(self) -> str | None:
        """The tap that the network computes last, after which it is cut; None for the encoder."""
        if not self.taps:
            return None
        return self.model.deepest([self.model.tap(name) for name in self.taps]).name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each input."""
        if self.takes:  # a network of learned prompts
            return self.takes
        return (self.model.image,) if self.component == self.model.encoder else network_inputs(self.model)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each output: the taps; or, for an encoder, the posterior's ``mean`` and ``std``.

        The posterior is that before the scaling factor.
        """
        if self.gives:
            return self.gives
        rule = self.model.noise_rule
        if self.component == self.model.encoder and rule is not None:
            latent = ("B", rule.latent_channels, "h", "w")
            return tuple(TensorSpec(name, "float32", latent) for name in ("mean", "std"))
        taps = [self.model.tap(name) for name in self.taps]
        # Maps of different taps differ in size, so each has axis letters of its own; and where channels are unknown
        # until the network runs, a letter for these too.
        return tuple(
            TensorSpec(tap.name, "float32", ("B", tap.channels or f"C{i}", f"h{i}", f"w{i}"))
            for i, tap in enumerate(taps)
        )


@dataclass(frozen=True)
class Profile:
    """The shapes and the precision that an engine is made for.

    Attributes:
        size: the network's input, ``(W, H)`` in pixels.
        ensemble: ensemble members per image in one run, E.
        tokens: prompt tokens, T.
        batch: most images in one run, B.
        precision: one of `PRECISIONS`.
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
        """Give the lengths of the lettered axes that the profile fixes: all but B, which may vary between runs."""
        width, height = self.size
        axes = {"E": self.ensemble, "T": self.tokens, "H": height, "W": width}
        rule = model.noise_rule
        if rule is not None:
            _, axes["h"], axes["w"] = rule.latent_shape(self.size)
        return axes

    @property
    def label(self) -> str:
        """The profile as a text for file names and messages: ``256x256.e4.t77.b1.fp32``."""
        width, height = self.size
        return f"{width}x{height}.e{self.ensemble}.t{self.tokens}.b{self.batch}.{self.precision}"


def network_inputs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """List a tapped network's inputs, in the order in which it takes them.

    `difftap.engine.noise.network_feeds` makes arrays for them. For SDXL, the prompt's last row is the pooled text
    embedding padded with zeros, and the sizes that SDXL is conditioned on are computed from the input's size.
    """
    width, rule = checkpoint.prompt_width, checkpoint.noise_rule
    prompt = (TensorSpec("prompt", "float32", ("B", "T", width)),) if width else ()
    if rule is None:
        return (checkpoint.image, *prompt)
    posterior: tuple[int | str, ...] = ("B", rule.latent_channels, "h", "w")
    members: tuple[int | str, ...] = ("B", "E", rule.latent_channels, "h", "w")
    return (
        TensorSpec("mean", "float32", posterior),
        TensorSpec("std", "float32", posterior),
        TensorSpec("posterior_noise", "float32", members),
        TensorSpec("noise", "float32", members),
        TensorSpec("signal", "float32", ("B",)),
        TensorSpec("sigma", "float32", ("B",)),
        TensorSpec("timestep", "int64", ("B",)),
        *prompt,
    )
