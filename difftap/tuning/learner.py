"""What is learned: a branch's prompt as parameters, for every kind, and the key that tells which prompt a pair gets.

Axis letters: K classes; n learned tokens; W their width; B prompts; L length of a sequence; N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.weights import load_transformer
from difftap.datasets.keypoints import Sample
from difftap.engine import Cache
from difftap.errors import InputError, ModelError, first_line, require
from difftap.features.keeper import View
from difftap.prompts import encode_prompt
from difftap.tuning.settings import TuneSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Learner", "PromptKey", "PromptSpace", "key_of", "load_text_encoder", "open_space", "views_of"]


TABLE_TOKENS = 24
"""Number of learned tokens of a model without a text encoder, whose prompts may have any length."""


@dataclass(frozen=True)
class PromptSpace:
    """The vector space of learned tokens, and how a sequence of them becomes what the UNet reads.

    With a CLIP text encoder, learned vectors stand in for token embeddings. They come between its own start and end
    vectors, and the sequence goes through the frozen encoder. No position is added to the learned vectors; start and
    end keep theirs. The embedded model has a table instead of an encoder: learned vectors are rows that the UNet reads
    directly, after the table's start row. A model with random weights has only the learned rows.

    Attributes:
        start: ``(S, W)``, vectors before the learned ones.
        end: ``(E, W)``, vectors after them.
        empty: ``(1, W)``, the vector that an empty prompt repeats.
        spread: standard deviation of the values of the model's own vectors.
        count: number of learned tokens.
        encoder: the frozen text encoder; None if the UNet reads the sequence itself.
        words: ``(V, W)``, the embeddings of the model's words; None if it has none.
        places: ``(n, W)``, what the text encoder adds to the word at each learned place; None if nothing is added.
    """

    start: torch.Tensor
    end: torch.Tensor
    empty: torch.Tensor
    spread: float
    count: int
    encoder: torch.nn.Module | None
    words: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """W, the width of a vector."""
        return int(self.empty.shape[1])

    def first(self, rows: int, initial: str, generator: torch.Generator) -> torch.Tensor:
        """Draw first values of ``rows`` prompts of learned vectors, ``(rows, n, W)``.

        Args:
            rows: K.
            initial: one of `difftap.tuning.settings.INITIALS`; without words, ``published`` is ``random``.
            generator: a CPU generator, so that first values do not depend on the device.
        """
        import torch

        if initial == "published" and self.words is not None:
            chosen = torch.randint(len(self.words), (rows, self.count), generator=generator)
            found = self.words.detach().cpu()[chosen]
            return found if self.places is None else found + self.places.detach().cpu()
        noise = torch.randn(rows, self.count, self.width, generator=generator) * self.spread
        return self.empty.cpu() + 0.01 * noise if initial == "empty" else noise

    def first_shared(self, count: int, initial: str, generator: torch.Generator) -> torch.Tensor:
        """Draw first values ``(count, W)`` of the tokens that all pairs share: uniform from 0 to 1 if ``published``."""
        import torch

        if initial == "published":
            return torch.rand(count, self.width, generator=generator)
        noise = torch.randn(count, self.width, generator=generator) * self.spread
        return self.empty.cpu() + 0.01 * noise if initial == "empty" else noise

    def sequence(self, learned: torch.Tensor) -> torch.Tensor:
        """Put learned vectors ``(B, n, W)`` between start and end, ``(B, L, W)``."""
        import torch

        count = len(learned)
        return torch.cat([self.start.expand(count, -1, -1), learned, self.end.expand(count, -1, -1)], dim=1)

    def encode(self, sequence: torch.Tensor) -> torch.Tensor:
        """Turn a sequence ``(B, L, W)`` into what the UNet reads, ``(B, L, D)``."""
        return sequence if self.encoder is None else self.encoder(sequence)


def load_text_encoder(model: Checkpoint) -> torch.nn.Module:
    """Load the checkpoint's CLIP text encoder, frozen, in fp32.

    Raises:
        ModelError: it cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    require("torch", "tune", "learning a prompt")
    transformers = require("transformers", "tune", f"the text encoder of model '{model.name}'")
    folder = model.folder / "text_encoder"
    return load_transformer(transformers.CLIPTextModel, folder, f"the text encoder of '{model.folder}'")


def open_space(model: Checkpoint, cache: Cache, device: str, asked: int = 0) -> PromptSpace:
    """Open the space of a model's learned prompts.

    Args:
        model: the checkpoint.
        cache: where embeddings are kept.
        device: the device of its vectors.
        asked: number of learned tokens; 0 for as many as the text encoder takes, or `TABLE_TOKENS` without one.

    Raises:
        InputError: the text encoder takes fewer tokens.
        ModelError: the text encoder cannot be loaded.
    """
    import torch

    if (model.folder / "text_encoder").is_dir():
        return _clip_space(model, device, asked)
    rows = torch.from_numpy(encode_prompt(model, "", cache)).to(device)  # (T, D)
    count, none = asked or TABLE_TOKENS, rows[:0]
    if (model.folder / "prompt_table").is_dir():
        from safetensors.torch import load_file

        table = load_file(str(model.folder / "prompt_table" / "model.safetensors"))["embedding"]
        words = table.float()[2:].to(device)  # the first two are start and padding
        return PromptSpace(rows[:1], none, rows[-1:], float(table.float().std()), count, None, words)
    return PromptSpace(none, none, rows[:1] * 0, 1.0, count, None)


def _clip_space(model: Checkpoint, device: str, asked: int) -> PromptSpace:
    from difftap.engine.torch_prompts import TextEncoder

    text = load_text_encoder(model).to(device)
    parts = {name.split(".")[-1]: part for name, part in text.named_modules()}
    words, places = parts["token_embedding"].weight, parts["position_embedding"].weight
    most = len(places) - 2  # start and end take two positions
    if asked > most:
        raise InputError(f"tokens is {asked}; allowed: 1 to {most}, what this text encoder takes")
    count = asked or most
    first, last = _ends(model)
    start, end = words[first] + places[0], words[last] + places[count + 1]
    return PromptSpace(
        start[None],
        end[None],
        words[last][None],
        float(words.std()),
        count,
        TextEncoder(text),
        words,
        places[1 : count + 1],
    )


def _ends(model: Checkpoint) -> tuple[int, int]:
    """Read the numbers of the start and end tokens from the tokenizer; a text encoder's configuration may be wrong."""
    transformers = require("transformers", "tune", f"the tokenizer of model '{model.name}'")
    try:
        words = transformers.CLIPTokenizer.from_pretrained(str(model.folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the tokenizer of '{model.folder}' cannot be loaded ({first_line(error)})") from error
    return int(words.bos_token_id), int(words.eos_token_id)


@dataclass(frozen=True)
class PromptKey:
    """What a prompt depends on.

    Attributes:
        category: the class, for ``class`` prompts.
        pair: the two views, for ``cpm`` prompts.
    """

    category: str = ""
    pair: tuple[View, View] | None = None


def views_of(sample: Sample) -> tuple[View, View]:
    """Give the views of a pair's source and target."""
    return View(sample.source), View(sample.target, sample.mirrored)


def key_of(sample: Sample, kind: str) -> PromptKey:
    """Give the key of the prompt that a pair gets."""
    if kind == "single":
        return PromptKey()
    return PromptKey(sample.category) if kind == "class" else PromptKey(pair=views_of(sample))


class Learner:
    """The prompt of one branch, as parameters.

    Args:
        settings: kind, number of tokens and first values.
        space: the space of learned vectors.
        classes: the classes that ``class`` prompts are learned for.
        image_tokens: ``(count, channels)`` of an image's tokens, for ``cpm``.
        branch: the branch's number, which is part of the seed.
        device: the device of the parameters.

    Attributes:
        head: the conditional head of ``cpm``; None for other kinds.
        rows: ``(K, n, W)``, one row per class or a single one; None for ``cpm``.
    """

    def __init__(
        self,
        settings: TuneSettings,
        space: PromptSpace,
        classes: Sequence[str],
        image_tokens: tuple[int, int],
        branch: int,
        device: str,
    ) -> None:
        import torch

        from difftap.engine.torch_prompts import ConditionalHead

        self.space = space
        self.kind = settings.kind
        self._rows = {name: k for k, name in enumerate(classes)} if settings.kind == "class" else {"": 0}
        # On the CPU, so that first values do not depend on the device.
        generator = torch.Generator().manual_seed(settings.seed * 1000 + branch)
        self.head: ConditionalHead | None = None
        self.rows: torch.Tensor | None = None
        if settings.kind == "cpm":
            shared = settings.shared or max(1, space.count // 3)
            count, channels = image_tokens
            with torch.random.fork_rng(devices=[]):  # the head's layers draw from torch's global generator
                torch.manual_seed(settings.seed * 1000 + branch)
                self.head = ConditionalHead(
                    channels, count, space.first_shared(shared, settings.initial, generator), space.count - shared,
                    space.start.cpu(), space.end.cpu(), published=settings.initial == "published",
                ).to(device)  # fmt: skip
        else:
            self.rows = space.first(len(self._rows), settings.initial, generator).to(device).requires_grad_()

    def groups(self, settings: TuneSettings) -> list[tuple[torch.Tensor, float]]:
        """List every parameter with its learning rate, in a fixed order, which a saved state relies on."""
        if self.head is None:
            assert self.rows is not None  # noqa: S101 - without a head there are rows
            return [(self.rows, settings.rate)]
        linear = ("channels.", "tokens.")
        return [
            (value, settings.linear_rate if name.startswith(linear) else settings.rate)
            for name, value in self.head.named_parameters()
        ]

    def sequences(self, keys: Sequence[PromptKey], tokens: Callable[[View], torch.Tensor]) -> torch.Tensor:
        """Build the sequences ``(B, L, W)`` of B keys; ``tokens`` gives the tokens ``(N, K)`` of an image."""
        import torch

        if self.head is None:
            assert self.rows is not None  # noqa: S101
            chosen = torch.tensor([self._rows[key.category] for key in keys], device=self.rows.device)
            return self.space.sequence(self.rows[chosen])
        pairs = [key.pair for key in keys if key.pair is not None]
        ends = [torch.stack([tokens(pair[side]) for pair in pairs]) for side in (0, 1)]
        found: torch.Tensor = self.head(*ends)
        return found

    def prompts(self, keys: Sequence[PromptKey], tokens: Callable[[View], torch.Tensor]) -> torch.Tensor:
        """Compute what the UNet reads for B keys, ``(B, L, D)``."""
        return self.space.encode(self.sequences(keys, tokens))
