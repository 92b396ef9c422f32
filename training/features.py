"""Extract feature maps of `pocket`, and compute its validation figures. Letters: B batch, C channels, h w cells."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from training.data import Config, ImageCache
from training.model import Pocket, Taps, scheduler
from training.pairs import held_out_indices, score, validation_pairs
from training.teacher import TargetCache, to_pixels


def stretched(images: list[np.ndarray], size: int) -> torch.Tensor:
    """Stretch images (H, W, 3) uint8 to squares, (B, 3, size, size) in [-1, 1]."""
    rows = [np.asarray(Image.fromarray(i).resize((size, size), Image.BICUBIC)) for i in images]
    return to_pixels(np.stack(rows))


@torch.no_grad()
def extract(
    pocket: Pocket, taps: Taps, std: float, images: list[np.ndarray], size: int, timestep: int,
    ensemble: int = 1, device: str = "cpu", chunk: int = 8,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Compute the maps of whole images with the empty prompt, averaged over `ensemble` noise draws.

    Returns {"latent": (B, C, h, w), "up1": ..., "up2": ...} float32. The seed of the noise is made from the image's own
    pixels and the member. Noise shared by two images would show where a cell is, which raises every score, even of an
    untrained network.
    """
    alpha = scheduler().alphas_cumprod[timestep]
    out: dict[str, list[torch.Tensor]] = {"latent": [], "up1": [], "up2": []}
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        keys = [zlib.crc32(image.tobytes()) for image in part]
        pixels = stretched(part, size).to(device)
        with torch.autocast(device, torch.bfloat16):
            mean = pocket.vae.encode(pixels).latent_dist.mean.float() / std
            b = len(mean)
            prompt = pocket.prompts([""] * b)
            sums: dict[str, torch.Tensor] = {}
            for member in range(ensemble):
                seeds = [torch.Generator().manual_seed(1000 * key + member) for key in keys]
                noise = torch.stack([torch.randn(mean.shape[1:], generator=seed) for seed in seeds]).to(device)
                noisy = alpha.sqrt() * mean + (1 - alpha).sqrt() * noise
                _, maps = taps.run(noisy, torch.full((b,), timestep, device=device), prompt, cut=True)
                for name, value in maps.items():
                    sums[name] = sums.get(name, 0) + value.float() / ensemble
        out["latent"].append(mean.cpu())
        for name, value in sums.items():
            out[name].append(value.cpu())
    return {name: torch.cat(parts) for name, parts in out.items()}


@torch.no_grad()
def noise_prediction(
    pocket: Pocket, std: float, pixels: torch.Tensor, timesteps: list[int], device: str = "cpu", chunk: int = 32
) -> dict[int, float]:
    """Measure the mean squared error of the predicted noise on images (B, 3, R, R), empty prompt, by timestep."""
    alphas, out = scheduler().alphas_cumprod, {}
    means = torch.cat([pocket.vae.encode(p.to(device)).latent_dist.mean / std for p in pixels.split(chunk)])
    for timestep in timesteps:
        generator = torch.Generator().manual_seed(timestep)
        total = 0.0
        for mean in means.split(chunk):
            noise = torch.randn(mean.shape, generator=generator).to(device)
            noisy = alphas[timestep].sqrt() * mean + (1 - alphas[timestep]).sqrt() * noise
            prompt = pocket.prompts([""] * len(mean))
            with torch.autocast(device, torch.bfloat16):
                predicted = pocket.unet(noisy, timestep, encoder_hidden_states=prompt).sample
            total += (predicted.float() - noise).square().mean((1, 2, 3)).sum().item()
        out[timestep] = round(total / len(means), 5)
    return out


@torch.no_grad()
def reconstruction(pocket: Pocket, pixels: torch.Tensor, chunk: int = 16) -> float:
    """Measure the mean absolute error of decoding the posterior mean of images (B, 3, R, R) in [-1, 1]."""
    total = 0.0
    for part in pixels.split(chunk):
        with torch.autocast(part.device.type, torch.bfloat16):
            decoded = pocket.vae.decode(pocket.vae.encode(part).latent_dist.mean).sample
        total += (decoded.float() - part).abs().mean((1, 2, 3)).sum().item()
    return round(total / len(pixels), 4)


@torch.no_grad()
def validate(
    pocket: Pocket, taps: Taps, std: float, images: ImageCache, targets: TargetCache,
    config: Config, device: str,
) -> dict[str, object]:  # fmt: skip
    """Compute quick figures on held-out photographs: PCK of warp and aligned pairs, alignment, noise prediction."""
    one_in, size = config["data"]["held_out_one_in"], 256
    for module in pocket.modules().values():
        module.eval()
    pairs = validation_pairs(images, one_in, 50, size)
    both = extract(pocket, taps, std, [p.a for p in pairs] + [p.b for p in pairs], size, 20, device=device)
    row: dict[str, object] = {}
    for tap in ("up1", "up2"):
        for kind, value in score(pairs, lambda _, tap=tap: list(both[tap])).items():
            row[f"{tap}_{kind}"] = [round(100 * float(v), 2) for v in value]
    held = np.array(held_out_indices(images, one_in)[::8])
    maps = extract(pocket, taps, std, [images.whole(i, size) for i in held], size, 20, device=device)["up2"]
    target = F.interpolate(targets.get(held, np.zeros(len(held))), maps.shape[2:], mode="bilinear", align_corners=False)
    row["align_up2"] = round(1 - float(F.cosine_similarity(maps, target[:, : maps.shape[1]], dim=1).mean()), 4)
    pixels = stretched([images.image(i) for i in held], 128)
    row["noise"] = {str(k): v for k, v in noise_prediction(pocket, std, pixels, [50, 200, 500, 900], device).items()}
    row["latent_std"] = round(std, 4)
    for module in pocket.modules().values():
        module.train()
    return row
