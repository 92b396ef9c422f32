"""Where learned vectors live, and what takes a sequence of them to what the UNet reads.

A model with a CLIP text encoder: its token embeddings, between its own start and end vectors, through the frozen
encoder; no position is added to the learned ones (start and end keep theirs). The embedded model has a table in the
encoder's place: learned vectors are rows straight in the UNet's cross-attention space, after the table's start row. A
model with random weights has neither: rows alone.

Axis letters: L length of a sequence; W width of its vectors; D width of the UNet's cross-attention; B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from difftap.backbones.checkpoint import Checkpoint
from difftap.engine import Cache
from difftap.errors import InputError, ModelError, first_line, require
from difftap.prompts import encode_prompt

if TYPE_CHECKING:
    import torch

__all__ = ["Space", "load_text_encoder", "open_space"]

TABLE_TOKENS = 24
"""Learned tokens of a model without a text encoder, whose prompts may have any length."""


@dataclass(frozen=True)
class Space:
    """The space learned vectors live in.

    Attributes:
        start: ``(S, W)`` before the learned vectors.
        end: ``(E, W)`` after them.
        empty: ``(1, W)``, the vector that an empty prompt repeats.
        spread: standard deviation of the known vectors' values.
        count: learned tokens.
        encoder: the frozen text encoder, None where the UNet reads the sequence itself.
    """

    start: torch.Tensor
    end: torch.Tensor
    empty: torch.Tensor
    spread: float
    count: int
    encoder: torch.nn.Module | None

    @property
    def width(self) -> int:
        """W."""
        return int(self.empty.shape[1])

    def first(self, count: int, initial: str, generator: torch.Generator) -> torch.Tensor:
        """First values of learned vectors ``(count, W)``: a little around the empty prompt's, or random."""
        import torch

        noise = torch.randn(count, self.width, generator=generator) * self.spread
        return noise if initial == "random" else self.empty.cpu() + 0.01 * noise

    def sequence(self, learned: torch.Tensor) -> torch.Tensor:
        """Learned vectors ``(B, n, W)`` with start and end, ``(B, L, W)``."""
        import torch

        count = len(learned)
        return torch.cat([self.start.expand(count, -1, -1), learned, self.end.expand(count, -1, -1)], dim=1)

    def encode(self, sequence: torch.Tensor) -> torch.Tensor:
        """What the UNet reads, ``(B, L, D)``."""
        return sequence if self.encoder is None else self.encoder(sequence)


def load_text_encoder(model: Checkpoint) -> torch.nn.Module:
    """The checkpoint's CLIP text encoder, frozen, in fp32.

    Raises:
        ModelError: it cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    require("torch", "tune", "learning a prompt")
    import torch

    transformers = require("transformers", "tune", f"the text encoder of model '{model.name}'")
    from safetensors import SafetensorError

    try:
        text = transformers.CLIPTextModel.from_pretrained(
            str(model.folder / "text_encoder"), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the text encoder of '{model.folder}' cannot be loaded ({first_line(error)})") from error
    frozen: torch.nn.Module = text.eval().requires_grad_(False)
    return frozen


def open_space(model: Checkpoint, cache: Cache, device: str, asked: int = 0) -> Space:
    """The space of a model's learned prompts.

    Args:
        model: the checkpoint.
        cache: where embeddings are kept.
        device: where its vectors are put.
        asked: learned tokens; 0 for as many as the text encoder takes, or `TABLE_TOKENS`.

    Raises:
        InputError: more tokens are asked for than fit.
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
        return Space(rows[:1], none, rows[-1:], float(table.float().std()), count, None)
    return Space(none, none, rows[:1] * 0, 1.0, count, None)


def _clip_space(model: Checkpoint, device: str, asked: int) -> Space:
    from difftap.engine.torch_prompts import TextEncoder

    text = load_text_encoder(model).to(device)
    parts = {name.split(".")[-1]: part for name, part in text.named_modules()}
    words, places = parts["token_embedding"].weight, parts["position_embedding"].weight
    most = len(places) - 2
    if asked > most:
        raise InputError(f"tokens is {asked}; allowed: 1 to {most}, what this text encoder takes")
    count = asked or most
    first, last = _ends(model)
    start, end = words[first] + places[0], words[last] + places[count + 1]
    return Space(start[None], end[None], words[last][None], float(words.std()), count, TextEncoder(text))


def _ends(model: Checkpoint) -> tuple[int, int]:
    """Numbers of the start and the end token; a text encoder's own configuration may name wrong ones."""
    transformers = require("transformers", "tune", f"the tokenizer of model '{model.name}'")
    try:
        words = transformers.CLIPTokenizer.from_pretrained(str(model.folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the tokenizer of '{model.folder}' cannot be loaded ({first_line(error)})") from error
    return int(words.bos_token_id), int(words.eos_token_id)
