"""The small networks of learned prompts as torch modules, which tuning trains and the export step traces.

Axis letters: B batch of pairs; N image tokens; C their channels; L length of the prompt's sequence; W width of its
tokens; M conditional tokens; D width of the UNet's cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConditionalHead", "HeadPart", "ImageTokens", "TextEncoder", "pool_table"]


def pool_table(tokens: int, pooled: int) -> Tensor:
    """List the tokens that each output of an adaptive max-pool reads, ``(pooled, K)``.

    Output i of M over N tokens reads [floor(i N / M), ceil((i + 1) N / M)), as torch's adaptive pooling does. These
    bins differ in length; a short one repeats its last token, which does not change its maximum.
    """
    # A table, because ONNX has no adaptive pooling for bins of unequal length, and it has gathers and maxima.
    bins = [list(range(i * tokens // pooled, -(-(i + 1) * tokens // pooled))) for i in range(pooled)]
    longest = max(map(len, bins))
    return torch.tensor([one + one[-1:] * (longest - len(one)) for one in bins])


class ConditionalHead(nn.Module):
    """SD4Match's conditional prompting module: from two images' tokens to a sequence of prompt tokens.

    The tokens are concatenated on channels, then: linear over channels, linear over tokens, adaptive max-pool to M,
    plus a position embedding, times tanh(alpha). The sequence is [start][shared tokens][M conditional tokens][end].

    Args:
        channels: C of the image tokens.
        tokens: N of the image tokens.
        shared: ``(G, W)``, initial values of the tokens that do not depend on the pair.
        conditional: M.
        start: ``(S, W)``, frozen, before the learned tokens.
        end: ``(E, W)``, frozen, after them.
    """

    start: Tensor
    end: Tensor
    bins: Tensor  # (M, K)

    def __init__(
        self,
        channels: int,
        tokens: int,
        shared: Tensor,
        conditional: int,
        start: Tensor,
        end: Tensor,
        *,
        published: bool = True,
    ) -> None:
        super().__init__()
        width = shared.shape[1]
        self.channels = nn.Linear(2 * channels, width)
        self.tokens = nn.Linear(tokens, tokens)
        if published:
            self.positions = nn.Parameter(torch.rand(conditional, width))
            self.alpha = nn.Parameter(torch.rand(1, conditional, width))
        else:
            self.positions = nn.Parameter(torch.randn(conditional, width) * 0.02)
            self.alpha = nn.Parameter(torch.zeros(1, conditional, width))  # tanh(0): none of them has a say at first
        self.shared = nn.Parameter(shared.clone())
        self.register_buffer("start", start.clone())
        self.register_buffer("end", end.clone())
        self.register_buffer("bins", pool_table(tokens, conditional), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # Heads of difftap 0.1.0 have one alpha for all tokens and channels.
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and alpha.shape == (1,):
            state_dict[f"{prefix}alpha"] = alpha.expand(self.alpha.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Compute the sequence ``(B, L, W)`` from the tokens ``(B, N, C)`` of both images."""
        both = self.channels(torch.cat([source, target], dim=2))  # (B, N, W)
        mixed = self.tokens(both.transpose(1, 2))  # (B, W, N)
        pooled = mixed[:, :, self.bins].amax(3).transpose(1, 2)  # (B, M, W)
        conditional = (pooled + self.positions) * torch.tanh(self.alpha)
        count = source.shape[0]
        fixed = [part.unsqueeze(0).expand(count, -1, -1) for part in (self.start, self.shared, self.end)]
        return torch.cat([fixed[0], fixed[1], conditional, fixed[2]], dim=1)


class TextEncoder(nn.Module):
    """A CLIP text encoder that takes vectors instead of words; no position embedding is added to them.

    Args:
        text: a ``CLIPTextModel``.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, sequence: Tensor) -> Tensor:
        """Compute the last hidden state ``(B, L, D)`` from a sequence ``(B, L, W)``."""

        # A hook replaces what the embedding layer gives, so that transformers' own forward pass can be used.
        def put(_module: nn.Module, _inputs: object, _output: Tensor) -> Tensor:
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
    """A vision transformer's patch tokens after its last layer, without the class token.

    Args:
        tokens: a ``Dinov2Model``.
    """

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, image: Tensor) -> Tensor:
        """Compute tokens ``(B, N, C)`` from images ``(B, 3, S, S)``, normalised as DINOv2 expects."""
        values: Tensor = self.tokens(pixel_values=image, return_dict=False)[0]
        return values[:, 1:]


class HeadPart(nn.Module):
    """A conditional head whose weights have the names that they have in a prompt file: ``head.*``."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Run the `ConditionalHead`."""
        found: Tensor = self.head(source, target)
        return found
