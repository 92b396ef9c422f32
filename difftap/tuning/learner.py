"""What is learned: a branch's prompt as parameters, for every kind, and the key that says which prompt an image gets.

Axis letters: K classes; n learned tokens; W their width; B prompts; L length of a sequence; N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from difftap.datasets.samples import Sample
from difftap.features.shelf import View
from difftap.tuning.settings import Settings
from difftap.tuning.space import Space

if TYPE_CHECKING:
    import torch

__all__ = ["Key", "Learner", "key_of", "views_of"]


@dataclass(frozen=True)
class Key:
    """What a prompt depends on: a class, a pair of views, or nothing."""

    category: str = ""
    pair: tuple[View, View] | None = None


def views_of(sample: Sample) -> tuple[View, View]:
    """A pair's images."""
    return View(sample.source), View(sample.target, sample.mirrored)


def key_of(sample: Sample, kind: str) -> Key:
    """Which prompt a pair gets."""
    if kind == "single":
        return Key()
    return Key(sample.category) if kind == "class" else Key(pair=views_of(sample))


class Learner:
    """One branch's prompt.

    Args:
        settings: kind, tokens and first values.
        space: where learned vectors live.
        classes: the classes that ``class`` prompts are learned for.
        image_tokens: ``(count, channels)`` of an image's tokens, for ``cpm``.
        branch: its number, which is part of its seed.
        device: where it lies.
    """

    def __init__(
        self,
        settings: Settings,
        space: Space,
        classes: Sequence[str],
        image_tokens: tuple[int, int],
        branch: int,
        device: str,
    ) -> None:
        import torch

        self.space = space
        self.kind = settings.kind
        self._rows = {name: k for k, name in enumerate(classes)} if settings.kind == "class" else {"": 0}
        generator = torch.Generator().manual_seed(settings.seed * 1000 + branch)
        self.head: torch.nn.Module | None = None
        self.rows: torch.Tensor | None = None
        if settings.kind == "cpm":
            from difftap.engine.torch_prompts import ConditionalHead

            shared = settings.shared or max(1, space.count // 3)
            count, channels = image_tokens
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed * 1000 + branch)
                self.head = ConditionalHead(
                    channels, count, space.first(shared, settings.initial, generator), space.count - shared,
                    space.start.cpu(), space.end.cpu(),
                ).to(device)  # fmt: skip
        else:
            first = space.first(len(self._rows) * space.count, settings.initial, generator)
            self.rows = first.view(len(self._rows), space.count, -1).to(device).requires_grad_()

    def groups(self, settings: Settings) -> list[tuple[torch.Tensor, float]]:
        """Every parameter with its learning rate, in a fixed order."""
        if self.head is None:
            assert self.rows is not None  # noqa: S101 - one of the two is there
            return [(self.rows, settings.rate)]
        linear = ("channels.", "tokens.")
        return [
            (value, settings.linear_rate if name.startswith(linear) else settings.rate)
            for name, value in self.head.named_parameters()
        ]

    def sequences(self, keys: Sequence[Key], tokens: Callable[[View], torch.Tensor]) -> torch.Tensor:
        """The sequences of these keys, ``(B, L, W)``; ``tokens`` gives an image's, ``(N, C)``."""
        import torch

        if self.head is None:
            assert self.rows is not None  # noqa: S101
            chosen = torch.tensor([self._rows[key.category] for key in keys], device=self.rows.device)
            return self.space.sequence(self.rows[chosen])
        pairs = [key.pair for key in keys if key.pair is not None]
        ends = [torch.stack([tokens(pair[side]) for pair in pairs]) for side in (0, 1)]
        found: torch.Tensor = self.head(*ends)
        return found

    def prompts(self, keys: Sequence[Key], tokens: Callable[[View], torch.Tensor]) -> torch.Tensor:
        """What the UNet reads for these keys, ``(B, L, D)``."""
        return self.space.encode(self.sequences(keys, tokens))
