"""The matching loss: cross-entropy of a Gaussian at the target keypoint and the softmax of the source's cosines.

Two rules (`RULES`). ``published`` is that of SD4Match's code (Li et al., CVPR 2024): the Gaussian has 7 x 7 places at
whole cells from the keypoint and is the normal density there, whose sum is 0.9654; the *probability* is read at them
bilinearly, and its logarithm is taken afterwards; only places strictly inside the map count. ``normalised`` is that of
difftap 0.1.0, which fills what the paper leaves open otherwise: the log-probability is read, places on the map's edge
count too, and the weights of those that count are scaled to sum to 1.

Axis letters: N keypoints; C channels; w h cells; P places of the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "PATCH",
    "RULES",
    "SIGMA",
    "TEMPERATURE",
    "cosines",
    "fused_cosines",
    "gaussian_cross_entropy",
    "join",
    "read",
]

TEMPERATURE = 0.04  # SD4Match's: cosines are divided by it
RULES = ("published", "normalised")
PATCH = 7  # places along a side of the Gaussian
SIGMA = 1.5  # of the Gaussian, in cells
_LEAST = 1e-30  # probability below which the logarithm is not followed: softmax may give 0 in float32
_FLOOR = 1e-6  # least cosine whose logarithm is taken; below it, the loss and its gradient would not be finite


def read(maps: Tensor, cells: Tensor) -> Tensor:
    """Read a map ``(C, h, w)`` bilinearly at fractional cells ``(N, 2)``, as ``(N, C)``; the border repeats."""
    height, width = maps.shape[1:]
    flat = maps.flatten(1)  # (C, h w)
    low = cells.floor()
    part = cells - low
    total: Tensor | None = None
    for dy in (0, 1):
        for dx in (0, 1):
            x = (low[:, 0] + dx).clamp(0, width - 1).long()
            y = (low[:, 1] + dy).clamp(0, height - 1).long()
            weight = (part[:, 0] if dx else 1 - part[:, 0]) * (part[:, 1] if dy else 1 - part[:, 1])
            piece = flat.index_select(1, y * width + x) * weight
            total = piece if total is None else total + piece
    assert total is not None  # noqa: S101 - four pieces were added
    return total.T


def join(maps: Sequence[Tensor], shares: Sequence[float], upsample: str) -> Tensor:
    """Join maps ``(C_i, h_i, w_i)`` into one whose cosines are the weighted mean of theirs.

    Args:
        maps: the maps.
        shares: their weights.
        upsample: how coarse maps are brought to the finest grid, ``bilinear`` or ``bicubic``.
    """
    if len(maps) == 1:
        return maps[0]
    whole = sum(shares)
    parts = [part * (share / whole) ** 0.5 for part, share in zip(_brought(maps, upsample), shares, strict=True)]
    return torch.cat(parts, dim=0)


def _brought(maps: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Scale each cell to length 1, interpolate to the finest grid, and scale each cell to length 1 again."""
    finest = (max(one.shape[1] for one in maps), max(one.shape[2] for one in maps))
    brought = []
    for one in maps:
        part = functional.normalize(one, dim=0)
        if tuple(part.shape[1:]) != finest:
            part = functional.interpolate(part[None], finest, mode=upsample, align_corners=False)[0]
        brought.append(functional.normalize(part, dim=0))
    return brought


def cosines(source: Tensor, target: Tensor, cells: Tensor) -> Tensor:
    """Compute the cosine of the source's vector at each of the cells ``(N, 2)`` with every target cell, ``(N, h, w)``.

    Args:
        source: map ``(C, h, w)`` of the source image.
        target: map ``(C, h, w)`` of the target image.
        cells: x and y of the source's keypoints, in cells.
    """
    queries = functional.normalize(read(source, cells), dim=1)
    found = queries @ functional.normalize(target.flatten(1), dim=0)
    return torch.unflatten(found, 1, tuple(target.shape[1:]))


def fused_cosines(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    cells: Tensor,
    shares: Sequence[float],
    upsample: str,
    combine: str,
) -> Tensor:
    """Compute scores ``(N, h, w)`` of a pair with several maps per image, combined as a recipe does.

    Args:
        source: the source image's maps ``(C_i, h_i, w_i)``.
        target: the target image's maps.
        cells: ``(N, 2)``, the source's keypoints in cells of the finest grid.
        shares: the maps' weights.
        upsample: how coarse maps are brought to the finest grid.
        combine: the recipe's rule: ``score-product``, or a rule whose scores are the weighted mean of cosines.
    """
    if combine != "score-product" or len(source) == 1:
        return cosines(join(source, shares, upsample), join(target, shares, upsample), cells)
    whole = sum(shares)
    logs = [
        share / whole * cosines(one, other, cells).clamp_min(_FLOOR).log()
        for one, other, share in zip(_brought(source, upsample), _brought(target, upsample), shares, strict=True)
    ]
    return torch.stack(logs).sum(0).exp()


def gaussian_cross_entropy(scores: Tensor, cells: Tensor, rule: str = "published") -> Tensor:
    """Compute the loss of each keypoint, ``(N,)``.

    Args:
        scores: ``(N, h, w)``, cosines of the source keypoints with every target cell.
        cells: ``(N, 2)``, x and y of the target keypoints in fractional cells, on the map.
        rule: one of `RULES`.
    """
    height, width = scores.shape[1:]
    scaled = scores.flatten(1) / TEMPERATURE
    reach = torch.arange(PATCH, device=scores.device, dtype=scores.dtype) - (PATCH - 1) / 2
    down, across = torch.meshgrid(reach, reach, indexing="ij")
    offsets = torch.stack([across.flatten(), down.flatten()], dim=1)  # (P, 2)
    gaussian = torch.exp(-offsets.square().sum(1) / (2 * SIGMA**2))  # (P,)
    places = cells[:, None] + offsets  # (N, P, 2)
    last = torch.tensor([width - 1, height - 1], device=scores.device, dtype=scores.dtype)
    if rule == "published":
        inside = ((places > 0) & (places < last)).all(2)
        weights = gaussian / (2 * torch.pi * SIGMA**2) * inside
        found = _read_each(torch.unflatten(scaled.softmax(1), 1, (height, width)), places)
        return -(weights * found.clamp_min(_LEAST).log()).sum(1)
    inside = ((places >= 0) & (places <= last)).all(2)
    weights = gaussian * inside
    weights = weights / weights.sum(1, keepdim=True)
    logs = functional.log_softmax(scaled, dim=1)
    return -(weights * _read_each(torch.unflatten(logs, 1, (height, width)), places)).sum(1)


def _read_each(maps: Tensor, places: Tensor) -> Tensor:
    """Read each of the maps ``(N, h, w)`` bilinearly at its own places ``(N, P, 2)``, as ``(N, P)``."""
    height, width = maps.shape[1:]
    flat = maps.flatten(1)
    low = places.floor()
    part = places - low
    total = torch.zeros(places.shape[:2], device=maps.device, dtype=maps.dtype)
    for dy in (0, 1):
        for dx in (0, 1):
            x = (low[..., 0] + dx).clamp(0, width - 1).long()
            y = (low[..., 1] + dy).clamp(0, height - 1).long()
            weight = (part[..., 0] if dx else 1 - part[..., 0]) * (part[..., 1] if dy else 1 - part[..., 1])
            total = total + weight * flat.gather(1, y * width + x)
    return total
