"""What a backbone is (a kind of network that can be tapped), and what a checkpoint is (one such network on this disk).

Each kind is one file of this folder and one line of `BACKBONES`. It declares, as plain data, how its checkpoint folder
is recognised, what its inputs are, its noise rule if it has one, and its taps; and it says how torch loads and runs it.
The rest of the package uses a network only through this interface.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.files import JsonObject
from difftap.backbones.layouts import describe_folder
from difftap.backbones.weights import find_weights
from difftap.coords import Size
from difftap.errors import ModelError, RecipeError
from difftap.recipe import Recipe
from difftap.taps import Tap
from difftap.tensorspec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKBONES",
    "RANDOM_MARK",
    "Checkpoint",
    "NoiseRule",
    "backbones",
    "pocket_folder",
]

BACKBONES = {
    "sd-unet": "difftap.backbones.sd_unet:SDUNet",
}
"""The kinds of network by name. To add one, write one file in this folder and one line here."""

RANDOM_MARK = "_difftap_random_weights"
"""Entry of ``model_index.json`` that holds the seed of a checkpoint built with random weights."""


def pocket_folder() -> Path:
    """Give the folder of the embedded model, which comes with the package."""
    return Path(str(resources.files("difftap"))) / "assets" / "pocket"


def backbones() -> dict[str, type[Checkpoint]]:
    """Import the kinds of network, by name, in the order in which they are asked whether a folder is theirs."""
    found = {}
    for name, place in BACKBONES.items():
        module, kind = place.split(":")
        found[name] = getattr(importlib.import_module(module), kind)
    return found


@dataclass(frozen=True)
class NoiseRule:
    """How noise is mixed into a latent. A backbone declares it; only `difftap.engine.noise` applies it.

    At timestep t the network is fed ``sqrt(a[t]) * scaling_factor * latent + sqrt(1 - a[t]) * noise``: DDPM's forward
    process (Ho et al. 2020, equation 4).

    Attributes:
        latent_channels: C of the encoder's latent.
        latent_stride: image pixels per latent cell.
        scaling_factor: the factor that gives the encoder's latent unit variance.
        alphas_cumprod: a, the cumulative products of (1 - beta) over the schedule, ``(timesteps,)`` float64.
    """

    latent_channels: int
    latent_stride: int
    scaling_factor: float
    alphas_cumprod: NDArray[np.float64] = field(repr=False)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Give the latent's shape ``(C, h, w)`` for an input of ``(W, H)`` pixels."""
        return self.latent_channels, size[1] // self.latent_stride, size[0] // self.latent_stride


@dataclass(frozen=True)
class Checkpoint(ABC):
    """One network on this disk. A subclass is a backbone: a kind of network.

    Attributes:
        name: the name that the user gave.
        folder: the folder of its files.
        components: its networks with weights of their own; their hashes, in this order, identify the checkpoint.
        tapped: the component whose layers are tapped.
        encoder: the component that turns an image into the posterior of its latent; None if the tapped network takes
            the image itself.
        image: name, dtype and shape of an image as the first network takes it.
        hub_files: patterns of the files to download from a hub repository.
    """

    name: str
    folder: Path

    components: ClassVar[tuple[str, ...]]
    tapped: ClassVar[str]
    encoder: ClassVar[str | None] = None
    image: ClassVar[TensorSpec] = TensorSpec("image", "float32", ("B", 3, "H", "W"))
    hub_files: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def load(folder: Path, name: str | None = None) -> Checkpoint:
        """Read a checkpoint folder's configuration, and make sure that its weights exist and are safe to load.

        Raises:
            ModelError: the folder is missing, lacks a component, or holds pickled weights.
        """
        if not folder.is_dir():
            raise ModelError(f"no model folder at '{folder}'; give a diffusers-format folder")
        kinds = backbones()
        kind = next((one for one in kinds.values() if one.recognises(folder)), None)
        if kind is None:
            other = describe_folder(folder)
            if other is not None:
                raise ModelError(other)
            kind = next(iter(kinds.values()))  # its error says what is missing
        return kind.read(folder, name or str(folder))

    # What goes in

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Tell from the names of its files whether a folder holds a network of this kind."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, name: str) -> Checkpoint:
        """Read the configuration of a folder of this kind; weights are only looked for.

        Raises:
            ModelError: a component is missing, damaged or of an unknown kind, or its weights are pickled.
        """

    @property
    @abstractmethod
    def size_step(self) -> int:
        """Input sizes must be multiples of this many pixels."""

    @property
    def prompt_width(self) -> int:
        """D of the prompt embedding ``(T, D)`` that the network takes; 0 if it takes none."""
        return 0

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding, which is the prompt's last row padded with zeros; 0 if there is none."""
        return 0

    @property
    def noise_rule(self) -> NoiseRule | None:
        """How noise is mixed into the latent; None for a network that takes images."""
        return None

    def attention_bytes(self, size: Size) -> int:
        """Give the bytes of one member's largest attention table ``(heads, cells, cells)``; 0 if it is negligible."""
        return 0

    def check(self, recipe: Recipe) -> None:
        """Make sure, before anything slow starts, that this network can do what a recipe asks.

        Raises:
            RecipeError: the size, a tap, a timestep, a prompt or noise does not fit.
            ModelError: its noise schedule is of an unknown kind.
        """
        self.check_size(recipe.size)
        rule = self.noise_rule
        steps = 1 if rule is None else len(rule.alphas_cumprod)
        if rule is None and recipe.noise != "none":
            raise RecipeError(
                f"noise is '{recipe.noise}'; allowed: none (with ensemble 1), since '{self.name}' is a network that is "
                "fed images, without noise"
            )
        for branch in recipe.branches:
            if branch.timestep >= steps:
                allowed = f"0 to {steps - 1}, the schedule of" if rule else "0, since there is no schedule in"
                raise RecipeError(f"timestep is {branch.timestep}; allowed: {allowed} '{self.name}'")
            if not self.prompt_width and (branch.prompt or recipe.learned):
                asked = repr(branch.prompt) if branch.prompt else "learned"
                raise RecipeError(f"prompt is {asked}; allowed: none, since '{self.name}' takes no prompt")
            for name in branch.taps:
                self.tap(name)

    # What is tapped

    @property
    @abstractmethod
    def taps(self) -> tuple[Tap, ...]:
        """All taps that have a short name, in the order in which the network computes them."""

    def tap(self, name: str) -> Tap:
        """Find a tap by its short name or module path.

        Raises:
            RecipeError: there is none; the message lists those that exist.
        """
        for tap in self.taps:
            if name in (tap.name, tap.module):
                # Under the name that was asked for, because that is what the graph's output is called.
                return Tap(name, tap.module, tap.channels, tap.stride)
        known = ", ".join(tap.name for tap in self.taps)
        raise RecipeError(f"no tap '{name}' in '{self.name}'; allowed: {known}")

    def deepest(self, taps: Sequence[Tap]) -> Tap:
        """Find the tap that the network computes last: the exported graph ends there."""
        order = [tap.module for tap in self.taps]
        return max(taps, key=lambda tap: order.index(tap.module))

    # What lies on the disk

    @abstractmethod
    def config(self, component: str) -> JsonObject:
        """Give a component's configuration: together with the weights it decides the numbers."""

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """Find a component's safetensors files.

        Raises:
            ModelError: there are none, or they are pickled.
        """
        return find_weights(self.folder / component)

    def weights_hash(self, component: str, memo: DigestMemo) -> str:
        """Hash a component's weight files and configuration with SHA-256.

        Raises:
            ModelError: a file cannot be read.
        """
        # Keys that begin with "_" name the program that wrote the file and its version. They change no number, so the
        # same weights saved again by another version keep their hash.
        plain = {key: value for key, value in self.config(component).items() if not key.startswith("_")}
        try:
            parts = [memo.digest(path) for path in self.weight_files(component)]
        except OSError as error:
            raise ModelError(f"the weights of the {component} in '{self.folder}' cannot be read ({error})") from error
        return hashlib.sha256("\n".join([*parts, json.dumps(plain, sort_keys=True)]).encode()).hexdigest()

    def check_size(self, size: Size) -> None:
        """Refuse an input size that the network's blocks cannot halve evenly.

        Raises:
            RecipeError: a side is not a multiple of `size_step`.
        """
        step = self.size_step
        if any(side % step or side < step for side in size):
            near = " x ".join(str(max(step, round(side / step) * step)) for side in size)
            raise RecipeError(
                f"size {size[0]} x {size[1]} does not fit model '{self.name}'; "
                f"allowed: multiples of {step}, such as {near}"
            )

    # What torch runs: `difftap.engine.torch_model` puts hooks on its modules, and the export step traces it.

    @abstractmethod
    def network(self, component: str) -> torch.nn.Module:
        """Load a component in float32, for inference, without downloading and without unpickling.

        Raises:
            ModelError: it cannot be loaded.
        """

    def encode(self, network: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the encoder on images ``(B, 3, H, W)``.

        Returns:
            mean and standard deviation of the posterior, each ``(B, C, h, w)``, before the scaling factor.
        """
        raise NotImplementedError

    def run(
        self,
        network: torch.nn.Module,
        given: torch.Tensor,
        timestep: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
    ) -> None:
        """Run the tapped network for its taps, which hooks read; its own output is dropped.

        Args:
            network: the tapped component.
            given: noisy latents ``(B, C, h, w)``, or images ``(B, 3, H, W)`` if there is no noise rule.
            timestep: ``(B,)``; None if there is no noise rule.
            prompt: ``(B, T, D)``; None if the network takes none.
        """
        network(given)

    def as_map(self, output: object, given: torch.Tensor) -> object:
        """Turn the output of a tapped module into a map ``(B, C, h, w)``, where it can be.

        Args:
            output: whatever the module returned; the caller refuses what is no map.
            given: the network's input, for the map's size.
        """
        # Blocks that feed skip connections return (hidden, skips); attention returns (hidden,).
        return output[0] if isinstance(output, tuple | list) else output

    def entrance(self, component: str, network: torch.nn.Module) -> torch.nn.Module:
        """Give the module at which a component's inputs are cast to half precision."""
        return network
