"""The small networks of learned prompts as torch modules: what tuning trains and what the export step traces.

Axis letters: B batch of pairs; N image tokens; C their channels; L length of the prompt's sequence; W width of its
tokens; M conditional tokens; D width of the UNet's cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConditionalHead", "HeadPart", "ImageTokens", "TextEncoder", "pool_table"]


def pool_table(tokens: int, pooled: int) -> Tensor:
    """Which tokens an adaptive pool reads for each of its outputs, ``(pooled, K)``.

    Bin i of M over N tokens is [floor(i N / M), ceil((i + 1) N / M)). Bins are of unequal length; short ones repeat
    their last token, which leaves their maximum as it is.
    """
    bins = [list(range(i * tokens // pooled, -(-(i + 1) * tokens // pooled))) for i in range(pooled)]
    longest = max(map(len, bins))
    return torch.tensor([one + one[-1:] * (longest - len(one)) for one in bins])


class ConditionalHead(nn.Module):
    """SD4Match's conditional prompting module: two images' tokens to a sequence of prompt tokens.

    Concatenated on channels -> linear over channels -> linear over tokens -> adaptive max-pool to M -> plus a position
    embedding -> times tanh(alpha); then [start][shared tokens][M conditional tokens][end].

    Args:
        channels: C of the image tokens.
        tokens: N of the image tokens.
        shared: ``(G, W)``, the first values of the tokens that do not depend on the pair.
        conditional: M.
        start: ``(S, W)``, frozen, before the learned tokens.
        end: ``(E, W)``, frozen, after them.
    """

    start: Tensor
    end: Tensor
    bins: Tensor  # (M, K)

    def __init__(
        self, channels: int, tokens: int, shared: Tensor, conditional: int, start: Tensor, end: Tensor
    ) -> None:
        super().__init__()
        width = shared.shape[1]
        self.channels = nn.Linear(2 * channels, width)
        self.tokens = nn.Linear(tokens, tokens)
        self.positions = nn.Parameter(torch.randn(conditional, width) * 0.02)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.shared = nn.Parameter(shared.clone())
        self.register_buffer("start", start.clone())
        self.register_buffer("end", end.clone())
        self.register_buffer("bins", pool_table(tokens, conditional), persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` of both images to a sequence ``(B, L, W)``."""
        both = self.channels(torch.cat([source, target], dim=2))  # (B, N, W)
        mixed = self.tokens(both.transpose(1, 2))  # (B, W, N)
        pooled = mixed[:, :, self.bins].amax(3).transpose(1, 2)  # (B, M, W)
        conditional = (pooled + self.positions) * torch.tanh(self.alpha)
        count = source.shape[0]
        fixed = [part.unsqueeze(0).expand(count, -1, -1) for part in (self.start, self.shared, self.end)]
        return torch.cat([fixed[0], fixed[1], conditional, fixed[2]], dim=1)


class TextEncoder(nn.Module):
    """A CLIP text encoder fed with vectors in place of words; no position is added to them.

    Args:
        text: a ``CLIPTextModel``.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, sequence: Tensor) -> Tensor:
        """``(B, L, W)`` to the last hidden state ``(B, L, D)``."""

        def put(_module: nn.Module, _inputs: Any, _output: Tensor) -> Tensor:
            return sequence

        embeddings = next(part for name, part in self.text.named_modules() if name.split(".")[-1] == "embeddings")
        handle = embeddings.register_forward_hook(put)
        try:
            words = torch.zeros(
                sequence.shape[:2], dtype=torch.long, device=sequence.device
            )  # only their number counts
            hidden: Tensor = self.text(input_ids=words, return_dict=False)[0]
        finally:
            handle.remove()
        return hidden


class ImageTokens(nn.Module):
    """A vision transformer's last patch tokens, its class token dropped.

    Args:
        tokens: a ``Dinov2Model``.
    """

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, image: Tensor) -> Tensor:
        """``(B, 3, S, S)``, normalised, to ``(B, N, C)``."""
        values: Tensor = self.tokens(pixel_values=image, return_dict=False)[0]
        return values[:, 1:]


class HeadPart(nn.Module):
    """A conditional head under the name that its weights have in a prompt file."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """As `ConditionalHead`."""
        found: Tensor = self.head(source, target)
        return found
