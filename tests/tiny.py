"""Tiny random checkpoints of Stable Diffusion's shape, for tests that need no trained weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 24, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.5,
}
TINY_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


MINI_UNET = {
    **TINY_UNET,
    "block_out_channels": (8, 16, 16),
    "cross_attention_dim": 6,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Fewer blocks: quick to trace."""
MINI_VAE = {
    **TINY_VAE,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def write_tiny(
    folder: Path,
    seed: int = 0,
    *,
    half: bool = False,
    unet: Mapping[str, Any] = TINY_UNET,
    vae: Mapping[str, Any] = TINY_VAE,
    shard: str = "10GB",
) -> Path:
    """Write a tiny checkpoint in diffusers format; its prompts come from seeded noise."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae)}
    for part, module in modules.items():
        (module.half() if half else module).save_pretrained(folder / part, max_shard_size=shard)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(TINY_SCHEDULE))
    (folder / "model_index.json").write_text(json.dumps({"_difftap_random_weights": seed}))
    return folder


MINI_XL_UNET = {
    **MINI_UNET,
    "cross_attention_dim": 14,
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}
"""SDXL's kind: no attention in the first block, and a pooled text embedding (6 wide) with six sizes as conditions."""
