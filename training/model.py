"""`pocket`: a small VAE, UNet and prompt table in diffusers' classes; how it is built, tapped and exported.

Letters: B batch, C channels, h w latent cells, T prompt length, D embedding width.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from training.data import Config


class PromptTable(nn.Module):
    """Word embeddings without positions. The rows are: start, padding, then one per known word."""

    def __init__(self, words: list[str], length: int, dim: int) -> None:
        super().__init__()
        self.words, self.length, self.dim = list(words), length, dim
        self.embedding = nn.Parameter(torch.randn(len(words) + 2, dim))
        self._row = {word: 2 + n for n, word in enumerate(words)}

    def ids(self, text: str) -> list[int]:
        """Give the rows of a text: start, known words, padding, cut to `length`. Unknown words are dropped."""
        known = [self._row[w] for w in re.findall(r"[a-z0-9]+", text.lower()) if w in self._row]
        return ([0] + known + [1] * self.length)[: self.length]

    def forward(self, texts: list[str]) -> torch.Tensor:
        """Turn B prompts into embeddings (B, T, D)."""
        return self.embedding[torch.tensor([self.ids(t) for t in texts], device=self.embedding.device)]


@dataclass
class Pocket:
    """The three trained parts."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    prompts: PromptTable

    def modules(self) -> dict[str, nn.Module]:
        """Give the parts by the names of their folders."""
        return {"vae": self.vae, "unet": self.unet, "prompt_table": self.prompts}

    def parameters(self) -> list[nn.Parameter]:
        """List all trained parameters, in a fixed order, which checkpoints rely on."""
        return [p for m in self.modules().values() for p in m.parameters()]


def build(config: Config, words: list[str]) -> Pocket:
    """Build the model with random weights from the [model] section."""
    vae_channels, unet_channels = config["vae_channels"], config["unet_channels"]
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(vae_channels),
        layers_per_block=1,
        latent_channels=config["latent_channels"],
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # Start with a narrow posterior (std 0.14). With the default std of 1, the first latents are only noise.
        vae.quant_conv.bias[config["latent_channels"] :] = -4.0
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=config["latent_channels"],
        out_channels=config["latent_channels"],
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=tuple(unet_channels),
        layers_per_block=config["layers"],
        cross_attention_dim=config["cross_attention_dim"],
        # diffusers reads `attention_head_dim` as the number of heads in this class.
        attention_head_dim=tuple(config["unet_heads"]),
        norm_num_groups=32,
        use_linear_projection=True,
    )
    return Pocket(vae, unet, PromptTable(words, config["prompt_length"], config["cross_attention_dim"]))


class _ReachedError(Exception):
    """Raised by a hook once the deepest wanted tap has been computed."""


class Taps:
    """Read the outputs of up_blocks[1] and [2] of a UNet through forward hooks.

    With `cut`, the pass stops after up_blocks[2], because the last block takes a quarter of the time and no tap needs
    it.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet, self.cut, self.maps = unet, False, {}
        for index in (1, 2):
            unet.up_blocks[index].register_forward_hook(self._hook(f"up{index}", index == 2))

    def _hook(self, name: str, last: bool) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def keep(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            self.maps[name] = output
            if last and self.cut:
                raise _ReachedError

        return keep

    def run(
        self, latents: torch.Tensor, timesteps: torch.Tensor, prompt: torch.Tensor, cut: bool
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Run the UNet on latents (B, C, h, w).

        Returns the predicted noise, or None with `cut`; and {"up1": (B, C, h/2, w/2), "up2": (B, C, h, w)}.
        """
        self.cut, self.maps = cut, {}
        try:
            noise = self.unet(latents, timesteps, encoder_hidden_states=prompt).sample
        except _ReachedError:
            noise = None
        finally:
            self.cut = False  # validation calls the UNet itself, and needs the whole pass
        return noise, self.maps


def scheduler() -> DDIMScheduler:
    """Build the noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def export(pocket: Pocket, scaling_factor: float, folder: Path) -> int:
    """Write the checkpoint folder in half precision and replace an old one. Returns its size in bytes.

    Other files in `folder` (exported graphs, the model card) are kept. Raises ValueError if a weight is too large for
    half precision.
    """
    temp = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    pocket.vae.register_to_config(scaling_factor=float(scaling_factor))
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    for name, module in pocket.modules().items():
        (temp / name).mkdir()
        state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}
        if any(not torch.isfinite(v).all() for v in state.values()):
            raise ValueError(f"{name}: a weight does not fit half precision (not finite); nothing was exported")
        if name == "prompt_table":
            table = {"length": module.length, "dim": module.dim, "words": module.words}
            (temp / name / "config.json").write_text(json.dumps(table, indent=1) + "\n")
            save_file(state, temp / name / "model.safetensors")
        else:
            module.save_config(temp / name)
            save_file(state, temp / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            index[name] = ["diffusers", type(module).__name__]
    scheduler().save_config(temp / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (temp / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    ours = {p.name for p in temp.iterdir()}
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        for extra in folder.iterdir():
            if extra.name not in ours:
                (shutil.copytree if extra.is_dir() else shutil.copy2)(extra, temp / extra.name)
        folder.rename(old)
    for path in temp.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner may read
    temp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(p.stat().st_size for n in ours for p in [folder / n, *(folder / n).rglob("*")] if p.is_file())


def load(folder: Path) -> tuple[Pocket, float]:
    """Load an exported checkpoint in float32; give it and the std of its latents (1 / scaling factor)."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    table = json.loads((folder / "prompt_table" / "config.json").read_text())
    prompts = PromptTable(table["words"], table["length"], table["dim"])
    prompts.load_state_dict({k: v.float() for k, v in load_file(folder / "prompt_table" / "model.safetensors").items()})
    pocket = Pocket(vae.eval(), unet.eval(), prompts.eval())
    return pocket, 1 / vae.config.scaling_factor
