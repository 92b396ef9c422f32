"""Stable Diffusion's family of UNets: SD 1.x and 2.x, SDXL's base model, and the embedded pocket model.

The folder's layout is that of diffusers: ``unet/``, ``vae/`` and ``scheduler/``, and ``text_encoder/`` with
``tokenizer/`` (Stable Diffusion) or ``prompt_table/`` (the embedded model). Of these, only files that decide the
numbers are read here: each component's ``config.json`` and the noise schedule.

Short names of taps follow the blocks of a diffusers ``UNet2DConditionModel``:

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

Every other module path inside those blocks whose output is a map (``up_blocks.1.resnets.0.conv1``) works too; its
channels and stride are found by running it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.files import JsonObject
from difftap.backbones.checkpoint import Checkpoint, NoiseRule
from difftap.backbones.config import check_entries, read_config
from difftap.backbones.sd_config import SCHEDULER_RULES, SCHEDULERS, UNET_RULES, VAE_RULES
from difftap.backbones.weights import load_network
from difftap.coords import Size
from difftap.errors import ModelError, RecipeError, require
from difftap.taps import Tap

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

__all__ = ["SDUNet", "depth"]

_PATH = re.compile(r"^(?P<block>(?:down_blocks|up_blocks)\.\d+|mid_block)(?:\.[A-Za-z_0-9]+)*$")


@dataclass(frozen=True)
class SDUNet(Checkpoint):
    """A diffusers-format checkpoint of Stable Diffusion's family.

    Attributes:
        unet: content of ``unet/config.json``.
        vae: content of ``vae/config.json``.
        scheduler: content of ``scheduler/scheduler_config.json``.
    """

    unet: JsonObject = field(repr=False)
    vae: JsonObject = field(repr=False)
    scheduler: JsonObject = field(repr=False)

    components: ClassVar[tuple[str, ...]] = ("unet", "vae")
    tapped: ClassVar[str] = "unet"
    encoder: ClassVar[str | None] = "vae"
    hub_files: ClassVar[tuple[str, ...]] = (
        "model_index.json",
        "scheduler/*.json",
        "tokenizer/*",
        "tokenizer_2/*",
        *(
            f"{part}/{name}"
            for part in ("unet", "vae", "text_encoder", "text_encoder_2")
            for name in ("config.json", "*.safetensors.index*.json")
        ),
        "unet/diffusion_pytorch_model*.safetensors",
        "vae/diffusion_pytorch_model*.safetensors",
        "text_encoder/model*.safetensors",
        "text_encoder_2/model*.safetensors",
    )

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Tell whether the folder holds a folder ``unet``."""
        return (folder / "unet").is_dir()

    @classmethod
    def read(cls, folder: Path, name: str) -> SDUNet:
        """Read the three configurations, and check every entry that difftap uses.

        Raises:
            ModelError: a file is missing or damaged, an entry makes no sense, or the network is of another kind.
        """
        model = cls(
            name,
            folder,
            read_config(folder / "unet" / "config.json", "UNet"),
            read_config(folder / "vae" / "config.json", "VAE"),
            read_config(folder / "scheduler" / "scheduler_config.json", "scheduler"),
        )
        for config, wanted in ((model.unet, "UNet2DConditionModel"), (model.vae, "AutoencoderKL")):
            if config.get("_class_name") != wanted:
                raise ModelError(
                    f"'{folder}' holds a {config.get('_class_name')!r} where a {wanted} is needed; difftap reads "
                    "Stable Diffusion's UNet and VAE in diffusers format"
                )
        _check_scheduler(model)
        for component in cls.components:
            _check_config(component, model.config(component), folder)
            rules = UNET_RULES if component == "unet" else VAE_RULES
            check_entries(model.config(component), rules, folder / component / "config.json")
            model.weight_files(component)
        _check_kind(model)
        _check_pipeline(model)
        return model

    def config(self, component: str) -> JsonObject:
        """Give the content of ``config.json`` of ``unet`` or ``vae``."""
        return self.unet if component == "unet" else self.vae

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latent."""
        return int(self.vae.get("latent_channels", 4))  # here and below, defaults are those of diffusers' classes

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent cell: each encoder block but the last halves the map."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def size_step(self) -> int:
        """Input sizes must be multiples of this many pixels, so that every block halves and doubles evenly."""
        return int(self.latent_stride * 2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def scaling_factor(self) -> float:
        """The factor by which the latent is multiplied before noise is added."""
        return float(self.vae.get("scaling_factor", 0.18215))

    @property
    def prompt_width(self) -> int:
        """D: the width of the prompt embedding that cross-attention takes."""
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding that SDXL's UNet takes beside the prompt; 0 for other UNets.

        SDXL (Podell et al. 2024, section 2.2) projects it together with six sizes, each embedded like a timestep; the
        configuration gives the width of all of them together.
        """
        if self.unet.get("addition_embed_type") != "text_time":
            return 0
        return int(self.unet["projection_class_embeddings_input_dim"]) - 6 * int(self.unet["addition_time_embed_dim"])

    @cached_property
    def noise_rule(self) -> NoiseRule:
        """How the training schedule mixes noise into the VAE's latent."""
        return NoiseRule(self.latent_channels, self.latent_stride, self.scaling_factor, self.alphas_cumprod)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The schedule's cumulative products of (1 - beta), ``(T,)``: DDPM, Ho et al. 2020, section 2.

        Raises:
            ModelError: the schedule is of a kind difftap does not know.
        """
        config = self.scheduler
        first, last, usual = SCHEDULERS.get(_scheduler_name(config), SCHEDULERS["DDPM"])
        kind = config.get("beta_schedule", usual)
        try:
            steps = int(config.get("num_train_timesteps", 1000))
            start, end = float(config.get("beta_start", first)), float(config.get("beta_end", last))
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

    def attention_bytes(self, size: Size) -> int:
        """Give the bytes of one member's self-attention table on the finest grid that has attention.

        1.7 GB at 768 x 768 pixels for Stable Diffusion 2.1.
        """
        # Most of diffusers' configurations store the number of heads under the name attention_head_dim.
        heads = self.unet.get("num_attention_heads") or self.unet.get("attention_head_dim", 8)
        blocks = self.unet["down_block_types"]
        finest = next((i for i, kind in enumerate(blocks) if "Attn" in kind), 0)  # SDXL's first block has no attention
        count = int(heads[finest] if isinstance(heads, list) else heads)
        stride = self.latent_stride << finest
        cells = (size[0] // stride) * (size[1] // stride)
        return 4 * count * cells**2  # float32

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Every block and layer of the UNet that has a short name, in the order in which the network computes them."""
        unet = self.unet
        widths = [int(width) for width in unet["block_out_channels"]]
        down_types, up_types = list(unet["down_block_types"]), list(unet["up_block_types"])
        layers = unet.get("layers_per_block", 2)
        per_block = [int(n) for n in layers] if isinstance(layers, Sequence) else [int(layers)] * len(widths)
        taps: list[Tap] = []
        stride = self.latent_stride

        def add_block(name: str, path: str, kind: str, count: int, width: int, inner: int, outer: int) -> None:
            for layer in range(count):
                taps.append(Tap(f"{name}.res{layer}", f"{path}.resnets.{layer}", width, inner))
                if "CrossAttn" in kind or "AttnDown" in kind or "AttnUp" in kind:
                    taps.append(Tap(f"{name}.attn{layer}", f"{path}.attentions.{layer}", width, inner))
            taps.append(Tap(name, path, width, outer))

        for i, (kind, width) in enumerate(zip(down_types, widths, strict=True)):
            outer = stride if i == len(widths) - 1 else stride * 2  # the last block has no downsampler
            add_block(f"down{i}", f"down_blocks.{i}", kind, per_block[i], width, stride, outer)
            stride = outer
        if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
            taps.append(Tap("mid", "mid_block", widths[-1], stride))
        for i, (kind, width) in enumerate(zip(up_types, reversed(widths), strict=True)):
            outer = stride if i == len(widths) - 1 else stride // 2  # the last block has no upsampler
            # One layer more than the mirrored encoder block: it takes the skip connection of that block's input.
            add_block(f"up{i}", f"up_blocks.{i}", kind, per_block[-1 - i] + 1, width, stride, outer)
            stride = outer
        return tuple(taps)

    def tap(self, name: str) -> Tap:
        """Find a tap by its short name, or by the path of any module inside a block.

        Raises:
            RecipeError: the name fits no block or layer of this UNet; the message lists those that exist.
        """
        known = self.taps
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
            f"no tap '{name}' in this UNet; its blocks are {blocks}; layers are written like 'down2.attn0' or "
            "'up1.res0' ('difftap taps --model M' lists them all), and a module path like "
            "'up_blocks.1.attentions.0' works too"
        )

    def deepest(self, taps: Sequence[Tap]) -> Tap:
        """Find the tap that the UNet computes last, of any module path."""
        downs = len(self.unet["down_block_types"])
        return max(taps, key=lambda tap: depth(tap.module, downs))

    def network(self, component: str) -> torch.nn.Module:
        """Load one component in float32 with diffusers, from safetensors, without downloading.

        Raises:
            MissingExtraError: diffusers is not installed.
            ModelError: it cannot be loaded.
        """
        diffusers = require("diffusers", "export", "loading a checkpoint with torch")
        kind = diffusers.UNet2DConditionModel if component == "unet" else diffusers.AutoencoderKL
        config = dict(self.config(component))  # diffusers fills in its defaults
        what = f"the {component} in '{self.folder}'"
        return load_network(lambda: kind.from_config(config), self.weight_files(component), what)

    @cached_property
    def latent_shift(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of the latent, one a channel, that are taken out before it is scaled; None for most VAEs.

        diffusers feeds a UNet ``(latent - mean) * scaling_factor / std`` where ``latents_mean`` and ``latents_std`` are
        given (Playground 2.5), and ``(latent - shift_factor) * scaling_factor`` where that is.
        """
        mean, std, shift = (self.vae.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
        if isinstance(mean, list) and isinstance(std, list):
            return [float(one) for one in mean], [float(one) for one in std]
        if shift:
            return [float(shift)] * self.latent_channels, [1.0] * self.latent_channels
        return None

    def weights_hash(self, component: str, memo: DigestMemo) -> str:
        """Hash a component's weight files and configuration; see `Checkpoint.weights_hash`."""
        digest = super().weights_hash(component, memo)
        if component != "vae" or self.latent_shift is None:
            return digest
        # difftap 0.1.0 did not apply these entries: its graphs and features of such a model are other ones.
        return hashlib.sha256(f"{digest} normalised".encode()).hexdigest()

    def encode(self, network: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the VAE's encoder; see `Checkpoint.encode`."""
        import torch

        posterior = cast("AutoencoderKL", network).encode(image, return_dict=False)[0]
        if self.latent_shift is None:
            return posterior.mean, posterior.std
        mean, std = (torch.tensor(one, dtype=torch.float32).view(1, -1, 1, 1) for one in self.latent_shift)
        mean, std = mean.to(posterior.mean), std.to(posterior.mean)
        return (posterior.mean - mean) / std, posterior.std / std

    def run(
        self,
        network: torch.nn.Module,
        given: torch.Tensor,
        timestep: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
    ) -> None:
        """Run the UNet on noisy latents ``(B, C, h, w)``; see `Checkpoint.run`.

        For SDXL the pooled embedding is taken from the prompt's last row, and six sizes are added: original height and
        width, top and left of the crop, target height and width. They say that the image is whole and not cropped.
        """
        import torch

        added = None
        if self.pooled_width and prompt is not None:
            height, width = (side * self.latent_stride for side in given.shape[-2:])
            ones = torch.ones_like(prompt[:, -1, :1])  # (B, 1): sides may be symbolic while tracing
            sizes = torch.cat([ones * height, ones * width, ones * 0, ones * 0, ones * height, ones * width], dim=1)
            added = {"text_embeds": prompt[:, -1, : self.pooled_width], "time_ids": sizes}
            prompt = prompt[:, :-1]
        network(given, timestep, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False)

    def entrance(self, component: str, network: torch.nn.Module) -> torch.nn.Module:
        """Give the UNet, or the VAE's encoder (its decoder is never run)."""
        return network if component == "unet" else network.get_submodule("encoder")


def _check_config(part: str, config: JsonObject, folder: Path) -> None:
    """Check every entry that difftap itself reads, so that the error names the damaged file.

    Raises:
        ModelError: an entry is missing or makes no sense.
    """

    def whole(value: object) -> bool:
        return isinstance(value, int) and value > 0

    def per_block(value: object) -> bool:
        return isinstance(value, list) and len(value) == count

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def per_channel(value: object) -> bool:
        return isinstance(value, list) and len(value) == channels and all(map(number, value))

    widths = config.get("block_out_channels")
    count = len(widths) if isinstance(widths, list) and all(map(whole, widths)) else 0
    good = {"block_out_channels": count > 0}
    if part == "unet":
        layers = config.get("layers_per_block", 2)
        good |= {key: per_block(config.get(key)) for key in ("down_block_types", "up_block_types")}
        good["cross_attention_dim"] = whole(config.get("cross_attention_dim"))
        good["layers_per_block"] = whole(layers) or (per_block(layers) and all(map(whole, layers)))
    else:
        channels = config.get("latent_channels", 4)
        good["latent_channels"] = whole(channels)
        good["scaling_factor"] = number(config.get("scaling_factor", 1.0))
        good["shift_factor"] = number(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        good["latents_mean"] = (mean is None) == (std is None) and (mean is None or per_channel(mean))
        good["latents_std"] = std is None or (per_channel(std) and all(std))
    for key, fine in good.items():
        if not fine:
            raise ModelError(
                f"'{folder / part / 'config.json'}' has {key} = {config.get(key)!r}, which makes no sense; "
                "get the checkpoint again"
            )


def _check_kind(model: SDUNet) -> None:
    """Refuse UNets that need inputs which difftap does not give.

    Raises:
        ModelError: it is an inpainting UNet, or takes conditions other than timestep, prompt and SDXL's text and sizes.
    """
    channels = model.unet.get("in_channels", 4)
    if channels != model.latent_channels:
        raise ModelError(
            f"the UNet of '{model.name}' takes {channels} channels and its VAE's latent has {model.latent_channels}; "
            "allowed: equal numbers (an inpainting model's UNet takes a mask too: use the base model)"
        )
    if model.unet.get("addition_embed_type") == "text_time":
        given, sizes = (model.unet.get(k) for k in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
        if not isinstance(given, int) or not isinstance(sizes, int) or not 0 < model.pooled_width <= model.prompt_width:
            raise ModelError(
                f"the UNet of '{model.name}' has projection_class_embeddings_input_dim = {given!r} and "
                f"addition_time_embed_dim = {sizes!r}; allowed: those of SDXL's base model (a pooled text embedding "
                "and six sizes)"
            )


def _scheduler_name(config: JsonObject) -> str:
    return str(config.get("_class_name") or "").removesuffix("Scheduler")


def _check_scheduler(model: SDUNet) -> None:
    """Refuse schedules that mix noise by another rule than DDPM's betas.

    Raises:
        ModelError: the scheduler is of such a kind, or has an entry that is not applied.
    """
    name = _scheduler_name(model.scheduler)
    file = model.folder / "scheduler" / "scheduler_config.json"
    if name and name not in SCHEDULERS:
        rule = "sigmas" if name.startswith("EDM") else "flow matching" if "Flow" in name else "another rule"
        raise ModelError(
            f"'{file}' is a {name}Scheduler, which mixes noise by {rule}; allowed: schedulers with betas, such as "
            "DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler"
        )
    check_entries(model.scheduler, SCHEDULER_RULES, file)


def _check_pipeline(model: SDUNet) -> None:
    """Refuse SDXL's refiner, whose UNet takes five sizes, not six, and so is told apart by the pipeline alone.

    Raises:
        ModelError: it is one, or its second text encoder is of another width than the UNet takes.
    """
    file = model.folder / "model_index.json"
    pipeline = read_config(file, "pipeline") if file.is_file() else {}
    if pipeline.get("requires_aesthetics_score"):
        raise ModelError(f"'{model.folder}' is a refiner (requires_aesthetics_score); allowed: SDXL's base model")
    encoder = model.folder / "text_encoder_2" / "config.json"
    if model.pooled_width and encoder.is_file():
        width = read_config(encoder, "second text encoder").get("projection_dim", 512)
        if width != model.pooled_width:
            raise ModelError(
                f"the second text encoder of '{model.folder}' gives {width} numbers and its UNet takes "
                f"{model.pooled_width} beside six sizes; allowed: SDXL's base model (a refiner's UNet takes five sizes)"
            )


def depth(module: str, downs: int) -> tuple[int, ...]:
    """Give a key that sorts module paths by when the UNet computes them.

    Layers come before the block that holds them; within a block, residual layer ``k`` comes before attention layer
    ``k``. A deeper path sorts with the layer that holds it.

    Args:
        module: path of a module in a block.
        downs: number of encoder blocks.
    """
    parts = module.split(".")
    if parts[0] == "mid_block":
        block, rest = downs, parts[1:]
    else:
        block, rest = int(parts[1]) + (0 if parts[0] == "down_blocks" else downs + 1), parts[2:]
    if not rest:
        return (block, 1, 0, 0)
    if len(rest) == 1 or rest[0] not in ("resnets", "attentions"):
        return (block, 0, 10**6, 0)  # a sampler, which runs after the block's layers; or a list of all layers
    return (block, 0, int(rest[1]), int(rest[0] == "attentions"))
