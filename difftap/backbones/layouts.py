"""What a file or folder is that holds no checkpoint difftap reads: named, with the way to one that it does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from difftap.artifacts.tensors import locate_tensors
from difftap.backbones.config import read_config
from difftap.errors import ModelError

__all__ = ["describe_file", "describe_folder"]

_CONVERT = (
    'convert it with: python -c "from diffusers import {pipeline} as P; '
    "P.from_single_file('{path}').save_pretrained('{folder}')\" and give that folder"
)


def describe_file(path: Path) -> str:
    """Say what a file is that was given as a model, and what to give in its place; one line without its end."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        return (
            f"'{path}' is a pickled checkpoint, which can run code when loaded and is refused; allowed: a "
            "diffusers-format folder with safetensors weights"
        )
    if path.suffix == ".gguf":
        return f"'{path}' is a quantised checkpoint (GGUF); allowed: a diffusers-format folder with safetensors weights"
    try:
        names = locate_tensors([path])
    except ModelError:
        return f"'{path}' is a file, and no checkpoint; allowed: a diffusers-format folder, or a hub id owner/name"
    return _describe_tensors(path, names)


def _describe_tensors(path: Path, names: Iterable[str]) -> str:
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj"):
        return f"'{path}' holds a transformer (SD3, Flux), not a UNet; {_UNETS}"
    if has("lora_", ".lora.", "lora_up.", "lora_A."):
        return f"'{path}' holds a LoRA, a change to a checkpoint; fuse it into one, save that, and give its folder"
    if has("model.diffusion_model."):
        # SDXL keeps its text encoders under another name than Stable Diffusion 1 and 2.
        pipeline = "StableDiffusionXLPipeline" if has("conditioner.embedders.") else "StableDiffusionPipeline"
        convert = _CONVERT.format(pipeline=pipeline, path=path, folder=path.with_suffix("").name)
        return f"'{path}' is an original-layout single file; {convert}"
    if has("controlnet_", "input_hint_block."):
        return f"'{path}' holds a ControlNet, which steers a checkpoint; {_UNETS}"
    if has("down_blocks.") and has("up_blocks.", "mid_block."):
        return f"'{path}' holds a UNet's weights alone; give the model they belong to, and the file: BASE+{path.name}"
    return f"'{path}' is a safetensors file that holds no whole checkpoint; {_UNETS}"


_UNETS = "allowed: Stable Diffusion 1.x, 2.x and XL, as a diffusers-format folder or a hub id"


def describe_folder(folder: Path) -> str | None:
    """Say what a folder without a UNet is; None where nothing is known of it. One line without its end."""
    for part, what in (("transformer", "a transformer (SD3, Flux, PixArt)"), ("prior", "Stable Cascade's stages")):
        if (folder / part).is_dir():
            return f"'{folder}' holds {what}{_named(folder / part / 'config.json')}, not a UNet; {_UNETS}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt", ".gguf"))
    if (folder / "config.json").is_file():
        return (
            f"'{folder}' holds a single network{_named(folder / 'config.json')}, not a checkpoint with unet/, vae/ and "
            f"scheduler/; {_UNETS}"
        )
    return describe_file(files[0]) if files else None


def _named(config: Path) -> str:
    try:
        content = read_config(config, "network")
    except ModelError:
        return ""
    name = content.get("_class_name") or content.get("model_type")
    return f" ({name})" if isinstance(name, str) else ""
