"""What a backbone is: a kind of network that can be tapped, and one checkpoint of it on this disk.

Each kind is one file of this room and one line of `BACKBONES`. It declares, as plain data, how its folder is
recognised, what goes in, its noise rule if it has one, and its taps; and it says how torch loads and runs it. The rest
of the package asks for nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.digests import DigestMemo
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
    "read_config",
    "safetensors_files",
]

BACKBONES = {
    "sd-unet": "difftap.backbones.sd_unet:SDUNet",
}
"""The kinds of network by name. Adding one is one file in this folder and one line here."""

RANDOM_MARK = "_difftap_random_weights"
"""Entry of ``model_index.json`` that holds the seed of a checkpoint built with random weights."""
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def pocket_folder() -> Path:
    """Give the folder of the embedded model."""
    return Path(str(resources.files("difftap"))) / "assets" / "pocket"


def backbones() -> dict[str, type[Checkpoint]]:
    """List the kinds of network, in the order in which a folder is tried on them."""
    found = {}
    for name, place in BACKBONES.items():
        module, kind = place.split(":")
        found[name] = getattr(importlib.import_module(module), kind)
    return found


@dataclass(frozen=True)
class NoiseRule:
    """How noise is mixed into a latent: declared here, applied by `difftap.engine.noise` alone.

    At timestep t the network is fed ``sqrt(a[t]) * scaling_factor * latent + sqrt(1 - a[t]) * noise``: DDPM's forward
    process (Ho et al. 2020, equation 4).

    Attributes:
        latent_channels: C of the encoder's latent.
        latent_stride: image pixels per latent cell.
        scaling_factor: what brings the encoder's latent to unit variance.
        alphas_cumprod: a, the schedule's cumulative products of (1 - beta), ``(timesteps,)`` float64.
    """

    latent_channels: int
    latent_stride: int
    scaling_factor: float
    alphas_cumprod: NDArray[np.float64] = field(repr=False)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Give ``(C, h, w)`` of the latent of an input of ``(W, H)`` pixels."""
        return self.latent_channels, size[1] // self.latent_stride, size[0] // self.latent_stride


@dataclass(frozen=True)
class Checkpoint(ABC):
    """One network on this disk. A subclass is a backbone: a kind of network.

    Attributes:
        name: as it was asked for.
        folder: where it lies.
        components: its networks that have weights of their own; their hashes, in this order, name the checkpoint.
        tapped: the component whose layers are tapped.
        encoder: the component that turns an image into the posterior of its latent; None where the tapped network is
            fed the image itself.
        image: what an image is laid out as for the first network.
        prompt_width: D of the prompt embedding ``(T, D)`` that the network reads; 0 where it takes no prompt.
        hub_files: patterns of the files to fetch from a hub repository.
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
        """Read a checkpoint folder's configuration and make sure that its weights are there and safe to load.

        Raises:
            ModelError: the folder is missing, lacks a component, or holds pickled weights.
        """
        if not folder.is_dir():
            raise ModelError(f"no model folder at '{folder}'; give a diffusers-format folder")
        kinds = backbones()
        # A folder that no kind knows is read as the first one: its error says what is missing.
        kind = next((one for one in kinds.values() if one.recognises(folder)), next(iter(kinds.values())))
        return kind.read(folder, name or str(folder))

    # What goes in

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Tell by its files whether a folder is of this kind."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, name: str) -> Checkpoint:
        """Read a folder of this kind.

        Raises:
            ModelError: a part is missing, damaged or of an unknown kind, or holds pickled weights.
        """

    @property
    @abstractmethod
    def size_step(self) -> int:
        """Input sizes must be multiples of this many pixels."""

    @property
    def prompt_width(self) -> int:
        """D: the width of the prompt embedding that the network reads; 0 where it takes no prompt."""
        return 0

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding in the prompt's last row, filled up with zeros; 0 where there is none."""
        return 0

    @property
    def noise_rule(self) -> NoiseRule | None:
        """How noise is mixed into the latent; None for a network that is fed images."""
        return None

    def attention_bytes(self, size: Size) -> int:
        """Bytes of the largest attention table ``(heads, cells, cells)`` of one ensemble member; 0 for no matter."""
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
        """Everything that has a short name, in the order in which the network finishes it."""

    def tap(self, name: str) -> Tap:
        """Find a tap by its short name or module path.

        Raises:
            RecipeError: there is none; the message lists those that exist.
        """
        for tap in self.taps:
            if name in (tap.name, tap.module):
                return Tap(name, tap.module, tap.channels, tap.stride)
        known = ", ".join(tap.name for tap in self.taps)
        raise RecipeError(f"no tap '{name}' in '{self.name}'; allowed: {known}")

    def deepest(self, taps: Sequence[Tap]) -> Tap:
        """Find the tap that the network finishes last: where the exported graph is cut."""
        order = [tap.module for tap in self.taps]
        return max(taps, key=lambda tap: order.index(tap.module))

    # What lies on the disk

    @abstractmethod
    def config(self, component: str) -> Mapping[str, Any]:
        """Give a component's configuration: what decides its numbers beside the weights."""

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """Find a component's safetensors files.

        Raises:
            ModelError: there are none, or they are pickled.
        """
        return safetensors_files(self.folder / component)

    def weights_hash(self, component: str, memo: DigestMemo) -> str:
        """Hash a component's weight files and configuration, SHA-256.

        Raises:
            ModelError: a file cannot be read.
        """
        # Keys that begin with "_" name the writer and its version: they do not change a number.
        plain = {key: value for key, value in self.config(component).items() if not key.startswith("_")}
        try:
            parts = [memo.digest(path) for path in self.weight_files(component)]
        except OSError as error:
            raise ModelError(f"the weights of the {component} in '{self.folder}' cannot be read ({error})") from error
        return hashlib.sha256("\n".join([*parts, json.dumps(plain, sort_keys=True)]).encode()).hexdigest()

    def check_size(self, size: Size) -> None:
        """Refuse an input size that the blocks cannot halve evenly.

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

    # What torch runs: `difftap.engine.torch_model` puts hooks on it, and the export step traces it

    @abstractmethod
    def network(self, component: str) -> torch.nn.Module:
        """Load a component in float32, for inference; nothing from the network, nothing pickled.

        Raises:
            ModelError: it cannot be loaded.
        """

    def encode(self, network: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the encoder: images ``(B, 3, H, W)`` to the posterior's mean and standard deviation ``(B, C, h, w)``."""
        raise NotImplementedError

    def run(
        self,
        network: torch.nn.Module,
        given: torch.Tensor,
        timestep: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
    ) -> None:
        """Run the tapped network; its output is of no interest.

        Args:
            given: noisy latents ``(B, C, h, w)``, or images ``(B, 3, H, W)`` where there is no noise rule.
            timestep: ``(B,)``; None where there is no noise rule.
            prompt: ``(B, T, D)``; None where it takes no prompt.
        """
        network(given)

    def as_map(self, output: Any, given: torch.Tensor) -> Any:
        """Make a map ``(B, C, h, w)`` of a tapped module's output, for the input ``given``."""
        # Blocks that feed skip connections return (hidden, skips); attention returns (hidden,).
        return output[0] if isinstance(output, tuple | list) else output

    def entrance(self, component: str, network: torch.nn.Module) -> torch.nn.Module:
        """Give the module at which a component's inputs are cast to half precision."""
        return network


def read_config(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"'{path.parent.parent}' has no {what}: '{path}' is missing; a model is a diffusers-format folder with "
            "unet/, vae/ and scheduler/"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON ({error}); get the checkpoint again") from error
    if not isinstance(data, dict):
        raise ModelError(f"'{path}' should hold a JSON object, got {type(data).__name__}; get the checkpoint again")
    return data


def safetensors_files(folder: Path, stem: str = "diffusion_pytorch_model") -> tuple[Path, ...]:
    """Find the safetensors files of one component; the full-precision ones if there are variants.

    Args:
        folder: the component's.
        stem: what its writer calls such files.

    Raises:
        ModelError: there are none, some are missing, or they are pickled.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        listed = read_config(index, "weights index").get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ModelError(f"'{index}' names weights that are no files of its folder; get the checkpoint again")
        files = [folder / name for name in sorted(names)]
        lacking = [path for path in files if not path.is_file()]
        if lacking or not files:
            raise ModelError(f"'{index}' names weights that are missing: {lacking or 'none'}; get the checkpoint again")
        return tuple(files)
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return (folder / name,)
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"'{folder}' holds pickled weights ({pickled[0]}), which can run code when loaded and are refused; "
            "allowed: safetensors; save the model again with diffusers' save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"'{folder}' holds no weights; '{stem}.safetensors' was expected")
