"""The losses that `pocket` is trained with. Letters: B batch, C channels, h w cells, N sampled cells."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812


def align(features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Average 1 - cosine between cells and the leading components of `target`, weighted per image.

    features (B, C, h, w), target (B, >= C, h, w), weight (B,). The raw map is aligned, without a head in between,
    because users match with the raw map.
    """
    cosine = F.cosine_similarity(features.float(), target[:, : features.shape[1]], dim=1)  # (B, h, w)
    return ((1 - cosine).mean((1, 2)) * weight).sum() / weight.sum()


def relation(features: torch.Tensor, target: torch.Tensor, chosen: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the KL divergence between teacher and student of which cells of *other* images each cell is like.

    features (B, C, h, w), target (B, K, h, w), chosen (N,) indices into the B * h * w cells.
    """
    cells = features.shape[2] * features.shape[3]
    student = F.normalize(features.float().permute(0, 2, 3, 1).flatten(0, 2)[chosen], dim=1)
    teacher = F.normalize(target.permute(0, 2, 3, 1).flatten(0, 2)[chosen], dim=1)
    image = chosen // cells
    same = image[:, None] == image[None, :]
    log_p = ((teacher @ teacher.T) / temperature).masked_fill(same, -1e4).log_softmax(1)
    log_q = ((student @ student.T) / temperature).masked_fill(same, -1e4).log_softmax(1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def kl_to_normal(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Compute the KL divergence of the VAE's posterior from the unit normal, averaged over latent values."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
