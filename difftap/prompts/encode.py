"""From a prompt's text to the embedding ``(T, D)`` that a UNet's cross-attention reads.

Three kinds of model: the embedded one has a table of words; Stable Diffusion has a CLIP text encoder (torch and
transformers, run once per prompt and remembered in the cache); a model built with random weights has no text encoder at
all, so its prompts are seeded noise of a CLIP embedding's size. Axis letters: T tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.engine.cache import Cache
from difftap.errors import ArtefactError, ModelError, OutputError, first_line, require
from difftap.manifest import FileRecord, Manifest, atomic_path
from difftap.model import RANDOM_MARK, Model

__all__ = ["encode_prompt"]

_LOG = logging.getLogger("difftap")
_RANDOM_TOKENS = 77  # CLIP's sequence length


def encode_prompt(model: Model, prompt: str, cache: Cache) -> NDArray[np.float32]:
    """The embedding of a prompt, float32 ``(T, D)``.

    Raises:
        ModelError: the model holds nothing that encodes prompts.
        MissingExtraError: the model's text encoder needs packages that are not installed.
    """
    width = int(model.unet["cross_attention_dim"])
    if (model.folder / "prompt_table").is_dir():
        embedding = _from_table(model.folder / "prompt_table", prompt)
    elif (model.folder / "text_encoder").is_dir():
        embedding = _remembered(model, prompt, cache)
    else:
        embedding = _random(model, prompt, width)
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ModelError(
            f"the prompt embedding of model '{model.name}' has shape {embedding.shape}; its UNet reads width {width}; "
            "the checkpoint's parts do not belong together"
        )
    return np.ascontiguousarray(embedding, np.float32)


def _from_table(folder: Path, prompt: str) -> NDArray[np.float32]:
    """[start], the words that the table knows, then padding: a sentence of fixed length."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        table = load_file(folder / "model.safetensors")["embedding"]
        words = {word: row for row, word in enumerate(config["words"], start=2)}
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


def _random(model: Model, prompt: str, width: int) -> NDArray[np.float32]:
    """Seeded noise with a layer norm's unit variance, for models built with random weights."""
    try:
        seed = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))[RANDOM_MARK]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model '{model.name}' has no text encoder: '{model.folder}' holds neither text_encoder/ nor "
            "prompt_table/; get the whole checkpoint"
        ) from error
    key = hashlib.sha256(f"difftap-prompt-1:{seed}:{prompt}".encode()).digest()[:16]
    stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
    return stream.standard_normal((_RANDOM_TOKENS, width), np.float32)


def _remembered(model: Model, prompt: str, cache: Cache) -> NDArray[np.float32]:
    """CLIP's embedding, from the cache if this text encoder has seen this prompt."""
    files = sorted((model.folder / "text_encoder").glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"'{model.folder / 'text_encoder'}' holds no safetensors weights (pickled ones are refused); "
            "get the checkpoint again"
        )
    # The tokenizer and the encoder's configuration decide the embedding as much as the weights do.
    files += sorted(
        p for part in ("text_encoder", "tokenizer") for p in (model.folder / part).glob("*.[jt]*") if p.is_file()
    )
    made_from = {"files": [cache.memo.digest(path) for path in files], "prompt": prompt}
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    path = cache.folder / "prompts" / f"{key}.npy"
    manifest = path.with_suffix(".json")
    if manifest.is_file():
        try:
            Manifest.load(manifest).check(path.parent, made_from)
            known: NDArray[np.float32] = np.load(path, allow_pickle=False)
            return known
        except (ArtefactError, OSError, ValueError, EOFError) as error:
            _LOG.warning("%s; encoding the prompt again", error)
    embedding = _clip(model, prompt)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as scratch, open(scratch, "wb") as handle:
            np.save(handle, embedding)
        Manifest("prompt", made_from, {path.name: FileRecord.of(path)}).save(manifest)
    except (OSError, OutputError) as error:  # only a memory: the embedding is at hand
        _LOG.warning("the prompt's embedding could not be kept: %s", error)
    return embedding


def _clip(model: Model, prompt: str) -> NDArray[np.float32]:
    """Run the checkpoint's CLIP text encoder: the last hidden state of the padded sentence, as the pipelines use it."""
    torch = require("torch", "export", f"encoding a prompt for model '{model.name}'")
    transformers = require("transformers", "export", f"encoding a prompt for model '{model.name}'")
    from safetensors import SafetensorError

    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(model.folder / "tokenizer"), local_files_only=True)
        encoder = transformers.CLIPTextModel.from_pretrained(
            str(model.folder / "text_encoder"), local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the text encoder of '{model.folder}' cannot be loaded ({first_line(error)})") from error
    tokens = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = encoder(tokens.input_ids)[0][0]
    embedding: NDArray[np.float32] = hidden.float().numpy()
    return embedding
