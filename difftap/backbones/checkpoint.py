"""A model on this disk: a diffusers-format checkpoint folder, read without any heavy library.

Only what decides the numbers is read here: the components' ``config.json``, the noise schedule and the weights' hashes.
The folder's layout is that of diffusers: ``unet/``, ``vae/`` and ``scheduler/``, and ``text_encoder/`` with
``tokenizer/`` (Stable Diffusion) or ``prompt_table/`` (the embedded model).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.digests import DigestMemo
from difftap.coords import Size
from difftap.errors import ModelError, RecipeError
from difftap.taps import Tap, resolve

__all__ = ["COMPONENTS", "RANDOM_MARK", "Checkpoint", "pocket_folder"]

COMPONENTS = ("unet", "vae")
RANDOM_MARK = "_difftap_random_weights"
"""Entry of ``model_index.json`` that holds the seed of a checkpoint built with random weights."""
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def pocket_folder() -> Path:
    """Where the embedded model lies."""
    return Path(str(resources.files("difftap"))) / "assets" / "pocket"


def _read_config(path: Path, what: str) -> dict[str, Any]:
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


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component; the full-precision ones if there are variants."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        listed = _read_config(index, "weights index").get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ModelError(f"'{index}' names weights that are no files of its folder; get the checkpoint again")
        files = [folder / name for name in sorted(names)]
        lacking = [path for path in files if not path.is_file()]
        if lacking or not files:
            raise ModelError(f"'{index}' names weights that are missing: {lacking or 'none'}; get the checkpoint again")
        return tuple(files)
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        if (folder / name).is_file():
            return (folder / name,)
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"'{folder}' holds pickled weights ({pickled[0]}), which can run code when loaded and are refused; "
            "allowed: safetensors; save the model again with diffusers' save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"'{folder}' holds no weights; 'diffusion_pytorch_model.safetensors' was expected")


def _check_config(part: str, config: Mapping[str, Any], folder: Path) -> None:
    """Make sure of every entry that difftap reads itself, so that a damaged file is named here and not where it hurts.

    Raises:
        ModelError: an entry is missing or makes no sense.
    """

    def whole(value: object) -> bool:
        return isinstance(value, int) and value > 0

    def per_block(value: object) -> bool:
        return isinstance(value, list) and len(value) == count

    widths = config.get("block_out_channels")
    count = len(widths) if isinstance(widths, list) and all(map(whole, widths)) else 0
    good = {"block_out_channels": count > 0}
    if part == "unet":
        layers = config.get("layers_per_block", 2)
        good |= {key: per_block(config.get(key)) for key in ("down_block_types", "up_block_types")}
        good["cross_attention_dim"] = whole(config.get("cross_attention_dim"))
        good["layers_per_block"] = whole(layers) or (per_block(layers) and all(map(whole, layers)))
    else:
        good["latent_channels"] = whole(config.get("latent_channels", 4))
        good["scaling_factor"] = isinstance(config.get("scaling_factor", 1.0), int | float)
    for key, fine in good.items():
        if not fine:
            raise ModelError(
                f"'{folder / part / 'config.json'}' has {key} = {config.get(key)!r}, which makes no sense; "
                "get the checkpoint again"
            )


def _check_kind(model: Checkpoint) -> None:
    """Refuse UNets that need inputs which difftap does not feed.

    Raises:
        ModelError: an inpainting UNet, or one with conditions besides timestep, prompt and SDXL's text and sizes.
    """
    channels = model.unet.get("in_channels", 4)
    if channels != model.latent_channels:
        raise ModelError(
            f"the UNet of '{model.name}' takes {channels} channels and its VAE's latent has {model.latent_channels}; "
            "allowed: equal numbers (an inpainting model's UNet takes a mask too: use the base model)"
        )
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if model.unet.get(key) not in (None, "text_time" if key == "addition_embed_type" else None):
            raise ModelError(
                f"the UNet of '{model.name}' has {key} = {model.unet[key]!r}; allowed: conditions on timestep and "
                "prompt, as in Stable Diffusion 1.x and 2.x, and on text and sizes, as in SDXL's base model"
            )
    if model.unet.get("addition_embed_type") == "text_time":
        given, sizes = (model.unet.get(k) for k in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
        if not isinstance(given, int) or not isinstance(sizes, int) or not 0 < model.pooled_width <= model.prompt_width:
            raise ModelError(
                f"the UNet of '{model.name}' has projection_class_embeddings_input_dim = {given!r} and "
                f"addition_time_embed_dim = {sizes!r}; allowed: those of SDXL's base model (a pooled text embedding "
                "and six sizes)"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers-format checkpoint on this disk.

    Attributes:
        name: as it was asked for.
        folder: the checkpoint.
        unet: ``unet/config.json``.
        vae: ``vae/config.json``.
        scheduler: ``scheduler/scheduler_config.json``.
    """

    name: str
    folder: Path
    unet: Mapping[str, Any] = field(repr=False)
    vae: Mapping[str, Any] = field(repr=False)
    scheduler: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: Path, name: str | None = None) -> Checkpoint:
        """Read a checkpoint folder's configuration and make sure that its weights are there and safe to load.

        Raises:
            ModelError: the folder is missing, lacks a component, or holds pickled weights.
        """
        if not folder.is_dir():
            raise ModelError(f"no model folder at '{folder}'; give a diffusers-format folder")
        model = cls(
            name or str(folder),
            folder,
            _read_config(folder / "unet" / "config.json", "UNet"),
            _read_config(folder / "vae" / "config.json", "VAE"),
            _read_config(folder / "scheduler" / "scheduler_config.json", "scheduler"),
        )
        for config, wanted in ((model.unet, "UNet2DConditionModel"), (model.vae, "AutoencoderKL")):
            if config.get("_class_name") != wanted:
                raise ModelError(
                    f"'{folder}' holds a {config.get('_class_name')!r} where a {wanted} is needed; difftap reads "
                    "Stable Diffusion's UNet and VAE in diffusers format"
                )
        for component, config in zip(COMPONENTS, (model.unet, model.vae), strict=True):
            _check_config(component, config, folder)
            model.weight_files(component)
        _check_kind(model)
        return model

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files of ``unet`` or ``vae``."""
        return _weight_files(self.folder / component)

    def weights_hash(self, component: str, memo: DigestMemo) -> str:
        """SHA-256 over the hashes of one component's weight files and its configuration.

        Raises:
            ModelError: a file cannot be read.
        """
        config = self.unet if component == "unet" else self.vae
        # Keys that begin with "_" name the writer and its version: they do not change a number.
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            parts = [memo.digest(path) for path in self.weight_files(component)]
        except OSError as error:
            raise ModelError(f"the weights of the {component} in '{self.folder}' cannot be read ({error})") from error
        return hashlib.sha256("\n".join([*parts, json.dumps(plain, sort_keys=True)]).encode()).hexdigest()

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latent."""
        return int(self.vae.get("latent_channels", 4))

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent cell."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def size_step(self) -> int:
        """Input sizes must be multiples of this many pixels, so that every block halves and doubles evenly."""
        return int(self.latent_stride * 2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def scaling_factor(self) -> float:
        """What the latent is multiplied by before noise is added."""
        return float(self.vae.get("scaling_factor", 0.18215))

    @property
    def prompt_width(self) -> int:
        """D: the width of the prompt embedding that cross-attention reads."""
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding that SDXL's UNet takes besides the prompt; 0 for other UNets.

        SDXL (Podell et al. 2024, section 2.2) projects it together with six sizes, each embedded like a timestep.
        """
        if self.unet.get("addition_embed_type") != "text_time":
            return 0
        return int(self.unet["projection_class_embeddings_input_dim"]) - 6 * int(self.unet["addition_time_embed_dim"])

    def tap(self, name: str) -> Tap:
        """Find a tap of this model's UNet by name; see `difftap.taps.resolve`."""
        return resolve(name, self.unet, self.latent_stride)

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

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The schedule's cumulative products of (1 - beta), ``(T,)``: DDPM, Ho et al. 2020, section 2.

        Raises:
            ModelError: the schedule is of a kind difftap does not know.
        """
        config = self.scheduler
        kind = config.get("beta_schedule", "linear")
        try:
            steps = int(config.get("num_train_timesteps", 1000))
            start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
            trained = config.get("trained_betas")
            given = None if trained is None else np.asarray(trained, np.float64)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"the scheduler of model '{self.name}' cannot be read ({error}); get the checkpoint again"
            ) from error
        if given is not None:
            betas = given
        elif kind == "scaled_linear":  # Stable Diffusion's: linear in the square root
            betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, steps, dtype=np.float64)
        else:
            raise ModelError(f"model '{self.name}' has beta_schedule {kind!r}; allowed: scaled_linear, linear")
        alphas = np.asarray(np.cumprod(1.0 - betas), np.float64)
        if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1: the last step is pure noise
            root = np.sqrt(alphas)
            alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alphas
