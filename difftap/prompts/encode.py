"""Encoding the text of a prompt as the embedding ``(T, D)`` that a UNet's cross-attention takes.

The embedded model has a table of words. Stable Diffusion has a CLIP text encoder, which needs torch and transformers
and runs once per prompt: the cache keeps the result. A model built with random weights has no text encoder, so its
prompts are seeded noise of the size of a CLIP embedding. SDXL has two text encoders: their embeddings are concatenated,
and one more row holds the second encoder's pooled embedding, padded with zeros.

Axis letters: T tokens (for SDXL one more than the sentence has), D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.cache import Cache, Making
from difftap.backbones.checkpoint import RANDOM_MARK, Checkpoint
from difftap.backbones.weights import load_transformer, transformer_weights
from difftap.errors import ModelError, OutputError, first_line, require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.modeling_outputs import BaseModelOutput

__all__ = ["encode_prompt"]

_LOG = logging.getLogger("difftap")
_RANDOM_TOKENS = 77  # CLIP's sequence length


def encode_prompt(model: Checkpoint, prompt: str, cache: Cache) -> NDArray[np.float32]:
    """Encode a prompt as its embedding, float32 ``(T, D)``; ``(0, 0)`` for a network that takes none.

    Raises:
        ModelError: the model has nothing that encodes prompts.
        MissingExtraError: the model's text encoder needs packages that are not installed.
    """
    width = model.prompt_width
    if not width:
        return np.zeros((0, 0), np.float32)
    if (model.folder / "prompt_table").is_dir():
        embedding = _from_table(model.folder / "prompt_table", prompt)
    elif (model.folder / "text_encoder").is_dir():
        embedding = _remembered(model, prompt, cache)
    else:
        embedding = _random(model, prompt)
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ModelError(
            f"the prompt embedding of model '{model.name}' has shape {embedding.shape}; its UNet reads width {width}; "
            "the checkpoint's parts do not belong together"
        )
    return np.ascontiguousarray(embedding, np.float32)


def _from_table(folder: Path, prompt: str) -> NDArray[np.float32]:
    """Look up a sentence of fixed length in the table: [start], the words that it knows, then padding."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        table = load_file(folder / "model.safetensors")["embedding"]
        words = {word: row for row, word in enumerate(config["words"], start=2)}  # row 0 is [start], row 1 padding
        length = int(config["length"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the prompt table '{folder}' cannot be read ({error}); install or get the model again"
        ) from error
    asked = re.findall(r"[a-z0-9]+", prompt.lower())
    unknown = [word for word in asked if word not in words]
    if unknown:
        _LOG.warning(
            "this model does not know the word%s %s of the prompt: left out",
            "s" * (len(unknown) > 1),
            ", ".join(unknown),
        )
    rows = [0, *(words[word] for word in asked if word in words)][:length]
    return np.asarray(table[rows + [1] * (length - len(rows))], np.float32)


def _random(model: Checkpoint, prompt: str) -> NDArray[np.float32]:
    """Draw seeded noise for models built with random weights; its variance is 1, as after CLIP's last layer norm."""
    try:
        seed = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))[RANDOM_MARK]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model '{model.name}' has no text encoder: '{model.folder}' holds neither text_encoder/ nor "
            "prompt_table/; get the whole checkpoint"
        ) from error
    key = hashlib.sha256(f"difftap-prompt-1:{seed}:{prompt}".encode()).digest()[:16]
    stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
    embedding = stream.standard_normal((_RANDOM_TOKENS, model.prompt_width), np.float32)
    return _add_pooled(embedding, stream.standard_normal(model.pooled_width, np.float32))


def _add_pooled(embedding: NDArray[np.float32], pooled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Append SDXL's pooled embedding as one more row; other models have a pooled width of 0, and get none."""
    if not len(pooled):
        return embedding
    row = np.zeros((1, embedding.shape[1]), np.float32)
    row[0, : len(pooled)] = pooled
    return np.concatenate([embedding, row])


def _remembered(model: Checkpoint, prompt: str, cache: Cache) -> NDArray[np.float32]:
    """Give CLIP's embedding of a prompt, from the cache if this text encoder has encoded it before."""
    files = []
    for encoder in ("text_encoder", "text_encoder_2") if model.pooled_width else ("text_encoder",):
        weights = transformer_weights(model.folder / encoder)
        # The tokenizer and the encoder's configuration (.json and .txt files) decide the embedding as much as the
        # weights do.
        parts = (encoder, encoder.replace("text_encoder", "tokenizer"))
        files += [*weights, *sorted(p for part in parts for p in (model.folder / part).glob("*.[jt]*") if p.is_file())]
    identity = {"files": [cache.memo.digest(path) for path in files], "prompt": prompt}
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    encoded: list[NDArray[np.float32]] = []

    def make(scratch: Path) -> Making:
        encoded.append(_clip(model, prompt))
        with open(scratch, "wb") as handle:
            np.save(handle, encoded[0])
        return Making()

    try:
        path = cache.get_or_make("prompt", cache.folder / "prompts" / f"{key}.npy", identity, make)
    except OutputError as error:  # the prompt can be encoded without the cache, only not as fast the next time
        _LOG.warning("the prompt's embedding could not be kept: %s", error)
        return encoded[0] if encoded else _clip(model, prompt)
    known: NDArray[np.float32] = encoded[0] if encoded else np.load(path, allow_pickle=False)
    return known


def _clip(model: Checkpoint, prompt: str) -> NDArray[np.float32]:
    """Run the checkpoint's text encoders on the padded sentence, as diffusers' pipelines do.

    Stable Diffusion uses CLIP's last hidden state; SDXL uses the one before the last, of both encoders.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        ModelError: a text encoder cannot be loaded.
    """
    torch = require("torch", "export", f"encoding a prompt for model '{model.name}'")
    transformers = require("transformers", "export", f"encoding a prompt for model '{model.name}'")
    with torch.inference_mode():
        first = _encode(model, prompt, "", transformers.CLIPTextModel)
        if not model.pooled_width:
            return _plain(first[0])
        second = _encode(model, prompt, "_2", transformers.CLIPTextModelWithProjection)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return _add_pooled(_plain(hidden), _plain(second.text_embeds))


def _plain(value: Tensor) -> NDArray[np.float32]:
    """Take the only sentence of a batch, as a numpy array."""
    plain: NDArray[np.float32] = value[0].float().numpy()
    return plain


def _encode(
    model: Checkpoint, prompt: str, suffix: str, kind: type[CLIPTextModel | CLIPTextModelWithProjection]
) -> BaseModelOutput:
    """Tokenise a prompt and run one text encoder; give transformers' output with all hidden states.

    Args:
        model: the checkpoint.
        prompt: the text.
        suffix: of the encoder's and the tokenizer's folders: empty, or ``_2`` for SDXL's second ones.
        kind: the encoder's class.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import CLIPTokenizer

    folder = model.folder
    encoder = load_transformer(kind, folder / f"text_encoder{suffix}", f"the text encoder of '{folder}'")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / f"tokenizer{suffix}"), local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"the tokenizer of '{folder}' cannot be loaded ({first_line(error)})") from error
    tokens = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    output: BaseModelOutput = encoder(tokens.input_ids, output_hidden_states=True)
    return output
