"""The matching loss: a Gaussian at the target keypoint against the softmax of the source keypoint's cosines.

SD4Match (Li et al., CVPR 2024). Inferred, since the paper leaves it open: the Gaussian's 7 x 7 places lie at whole
cells from the keypoint, the log-probability is read there bilinearly, places outside the map are masked, and the rest
is normalised to sum to 1, so that the loss is a cross-entropy against a distribution over cells.

Axis letters: N keypoints; C channels; w h cells; P places of the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PATCH", "SIGMA", "TEMPERATURE", "cosines", "fused_cosines", "gaussian_cross_entropy", "join", "read"]

TEMPERATURE = 0.04
PATCH = 7
SIGMA = 1.5
_FLOOR = 1e-6  # of a cosine whose logarithm is taken


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
    """Join ``(C_i, h_i, w_i)`` into one whose cosines are the weighted mean of theirs: `difftap.matching.combine`."""
    if len(maps) == 1:
        return maps[0]
    whole = sum(shares)
    parts = [part * (share / whole) ** 0.5 for part, share in zip(_brought(maps, upsample), shares, strict=True)]
    return torch.cat(parts, dim=0)


def _brought(maps: Sequence[Tensor], upsample: str) -> list[Tensor]:
    """Each map with unit cells, on the finest grid, with unit cells again."""
    finest = (max(one.shape[1] for one in maps), max(one.shape[2] for one in maps))
    brought = []
    for one in maps:
        part = functional.normalize(one, dim=0)
        if tuple(part.shape[1:]) != finest:
            part = functional.interpolate(part[None], finest, mode=upsample, align_corners=False)[0]
        brought.append(functional.normalize(part, dim=0))
    return brought


def cosines(source: Tensor, target: Tensor, cells: Tensor) -> Tensor:
    """Cosine of the source's vector at each of the cells ``(N, 2)`` with every target cell, ``(N, h, w)``."""
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
    """Scores ``(N, h, w)`` of several maps an image, combined as a recipe does (``cells`` are of the finest grid)."""
    if combine != "score-product" or len(source) == 1:
        return cosines(join(source, shares, upsample), join(target, shares, upsample), cells)
    whole = sum(shares)
    logs = [
        share / whole * cosines(one, other, cells).clamp_min(_FLOOR).log()
        for one, other, share in zip(_brought(source, upsample), _brought(target, upsample), shares, strict=True)
    ]
    return torch.stack(logs).sum(0).exp()


def gaussian_cross_entropy(scores: Tensor, cells: Tensor) -> Tensor:
    """Compute the loss of each keypoint, ``(N,)``.

    Args:
        scores: ``(N, h, w)`` cosines of the source keypoints with every target cell.
        cells: ``(N, 2)`` the target keypoints in cells, fractional, on the map.
    """
    count, height, width = scores.shape
    logs = functional.log_softmax(scores.flatten(1) / TEMPERATURE, dim=1).view(count, 1, height, width)
    reach = torch.arange(PATCH, device=scores.device, dtype=scores.dtype) - (PATCH - 1) / 2
    down, across = torch.meshgrid(reach, reach, indexing="ij")
    offsets = torch.stack([across.flatten(), down.flatten()], dim=1)  # (P, 2)
    gaussian = torch.exp(-offsets.square().sum(1) / (2 * SIGMA**2))  # (P,)
    places = cells[:, None] + offsets  # (N, P, 2)
    last = torch.tensor([width - 1, height - 1], device=scores.device, dtype=scores.dtype)
    inside = ((places >= 0) & (places <= last)).all(2)
    weights = gaussian * inside
    weights = weights / weights.sum(1, keepdim=True)
    values = _read_each(logs[:, 0], places)
    return -(weights * values).sum(1)


def _read_each(maps: Tensor, places: Tensor) -> Tensor:
    """Row n of maps ``(N, h, w)`` read bilinearly at its own places ``(N, P, 2)``, as ``(N, P)``."""
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
