"""Files of learned prompts: safetensors with their provenance, read and written without torch.

A folder that ``difftap tune`` writes holds ``prompt.safetensors``; for conditional prompts also one exported head per
branch (``cpm.0.onnx`` and its manifest), whose weights are in that file. Tensors are named by branch:

===================  ===============  ==========================================================================
name                 shape            what
===================  ===============  ==========================================================================
``0.embedding``      ``(K, T, D)``    input of the UNet: one (single), or one per class (class; means for cpm)
``0.tokens``         ``(K, n, W)``    the learned vectors before the text encoder (single, class)
``0.head.*``         as the network   the conditional head's weights (cpm)
===================  ===============  ==========================================================================

Axis letters: K classes; T prompt tokens; D width of the UNet's cross-attention; n learned tokens; W their width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, write_atomic
from difftap.artifacts.manifest import file_digest
from difftap.artifacts.run import differences
from difftap.errors import InputError, ModelError
from difftap.prompts.tokens import TokenSource
from difftap.recipe import KINDS, Learned, Recipe

__all__ = [
    "PROMPT_FILE",
    "SCHEMA",
    "LearnedPrompts",
    "find_learned",
    "fits_of",
    "load_learned",
    "pinned",
    "remembered",
    "save_learned",
]

PROMPT_FILE = "prompt.safetensors"
SCHEMA = 1
_KEY = "difftap"


def fits_of(recipe: Recipe) -> dict[str, object]:
    """Give the part of a recipe that a learned prompt is tied to.

    Ensemble, seed, joining and matcher may differ when it is used.
    """
    # A prompt is learned on one member, so independent and antithetic noise are the same to it; no noise is not.
    return {
        "branches": [{"taps": list(branch.taps), "timestep": branch.timestep} for branch in recipe.branches],
        "size": list(recipe.size),
        "fit": recipe.fit,
        "noise": "none" if recipe.noise == "none" else "drawn",
    }


@dataclass(frozen=True)
class LearnedPrompts:
    """What a prompt file holds.

    Attributes:
        path: the safetensors file.
        sha256: its hash.
        about: its provenance: kind, model, recipe, data, settings, steps, scores.
        embeddings: one array per branch, ``(K, T, D)`` float32.
    """

    path: Path
    sha256: str
    about: JsonObject
    embeddings: tuple[NDArray[np.float32], ...] = field(repr=False)

    @property
    def kind(self) -> str:
        """``single``, ``class`` or ``cpm``."""
        return str(self.about["kind"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that it has prompts for; none for ``single``."""
        return tuple(self.about["classes"])

    @property
    def image_tokens(self) -> TokenSource | None:
        """Where image tokens come from, for conditional prompts; None for others."""
        data = self.about.get("image_tokens")
        return None if data is None else TokenSource.from_dict(data)

    def mode(self, asked: Learned) -> str:
        """Say what a prompt is made for: ``all`` (every image), ``class``, ``pair`` or ``image``.

        Args:
            asked: the recipe's choice; an empty mode asks for the kind's default.

        Raises:
            InputError: the kind has no such mode.
        """
        own = {"single": "all", "class": "class", "cpm": "pair"}[self.kind]
        allowed = {"single": (), "class": ("class",), "cpm": ("pair", "class", "image")}[self.kind]
        if asked.mode and asked.mode not in allowed:
            raise InputError(
                f"prompt mode is '{asked.mode}'; '{self.path}' holds {self.kind} prompts; allowed: "
                f"{', '.join(allowed) or 'none, since they depend on nothing'}"
            )
        return asked.mode or own

    def check(self, asked: Learned, recipe: Recipe, model: str, key: str) -> None:
        """Refuse prompts that were learned for another model or recipe.

        Args:
            asked: the recipe's entry for learned prompts.
            recipe: the recipe that would use them.
            model: the model's name, for the message.
            key: the model's key.

        Raises:
            InputError: they were learned for another model or recipe, are of another kind, or are not those that the
                recipe names by hash.
        """
        self.check_content(asked)
        if asked.kind and asked.kind != self.kind:
            raise InputError(f"'{self.path}' holds {self.kind} prompts; this recipe takes {asked.kind} prompts")
        if self.about["model"]["key"] != key:
            raise InputError(
                f"'{self.path}' was learned for model '{self.about['model']['name']}' (key "
                f"{self.about['model']['key']}), not for '{model}' (key {key}); learn one with 'difftap tune'"
            )
        wanted, made = fits_of(recipe), self.about["fits"]
        # Only the fields that this version compares: the file may have been written by a version that knows more.
        for name, theirs, ours in differences({name: made.get(name) for name in wanted}, wanted):
            raise InputError(
                f"'{self.path}' was learned for {name} = {json.dumps(theirs)}, and this recipe has "
                f"{json.dumps(ours)}; use the recipe it was learned for, or learn one with 'difftap tune'"
            )

    def check_content(self, asked: Learned) -> None:
        """Refuse prompts that are not those that the recipe names by hash.

        Raises:
            InputError: the recipe names the hash of another file.
        """
        if asked.sha256 and asked.sha256 != self.sha256:
            raise InputError(
                f"'{self.path}' holds other prompts than those asked for: its sha256 is {self.sha256[:16]}..., not "
                f"{asked.sha256[:16]}...; put that file back, or make again what was made with it"
            )

    def row(self, category: str | None) -> int:
        """Give the row of `embeddings` for a class; 0 for ``single``.

        Raises:
            InputError: there is no prompt for the class.
        """
        if self.kind == "single":
            return 0
        if category not in self.classes:
            said = "no class was given" if category is None else f"there is no prompt for class '{category}'"
            raise InputError(f"{said}; '{self.path}' holds {', '.join(self.classes)}")
        return self.classes.index(category)


def find_learned(path: str | Path) -> Path:
    """Find a prompt file: by its own path, or by that of its folder.

    Raises:
        InputError: there is none.
    """
    given = Path(path)
    try:
        file = given / PROMPT_FILE if given.is_dir() else given
        found = file.is_file()
    except OSError:  # too long a name for the file system
        found = False
    if not found:
        raise InputError(
            f"no learned prompts at '{path}'; learn them with 'difftap tune', or name another folder with --prompts"
        )
    return file


def load_learned(path: str | Path) -> LearnedPrompts:
    """Read a prompt file.

    Raises:
        InputError: there is none.
        ModelError: it is damaged, or is no prompt file.
    """
    from safetensors import SafetensorError, safe_open

    file = find_learned(path)
    try:
        with safe_open(str(file), framework="np") as handle:
            text, _, said = (handle.metadata() or {})[_KEY].partition("\n")
            names: list[str] = list(handle.keys())
            tensors = {name: handle.get_tensor(name) for name in names}
        if said and said != _content(text, tensors):  # files of difftap 0.1.0 have no hash
            raise ValueError("its content was changed: SHA-256 differs")
        about = json.loads(text)
        if about["schema"] != SCHEMA:
            raise ValueError(f"its schema is {about['schema']}, this difftap reads {SCHEMA}")
        if about["kind"] not in KINDS:
            raise ValueError(f"its kind is {about['kind']!r}")
        count = len(about["fits"]["branches"])
        rows = 1 if about["kind"] == "single" else len(about["classes"])
        embeddings = tuple(tensors[f"{k}.embedding"] for k in range(count))
        if any(one.ndim != 3 or one.dtype != np.float32 or len(one) != rows for one in embeddings):
            raise ValueError(f"its embeddings have shapes {[one.shape for one in embeddings]}")
        if not all(np.isfinite(one).all() for one in embeddings):
            raise ValueError("its embeddings are not finite")
        for name in ("model", "data", "settings", "scores", "steps"):
            about[name]  # a KeyError here says which entry is missing
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"'{file}' is no whole file of learned prompts ({what}); learn them again") from error
    return LearnedPrompts(file, file_digest(file), about, embeddings)


def _content(about: str, tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Hash a file's provenance and tensors: one changed byte of either gives another prompt, or another claim of it."""
    total = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


_remembered: dict[tuple[Path, int, int], LearnedPrompts] = {}


def remembered(path: str | Path) -> LearnedPrompts:
    """Load a prompt file as `load_learned` does, but read an unchanged file only once."""
    file = find_learned(path)
    stamp = file.stat()
    key = (file.resolve(), stamp.st_size, stamp.st_mtime_ns)
    if key not in _remembered:
        _remembered.clear()  # only the last file is kept: a process works with one
        _remembered[key] = load_learned(file)
    return _remembered[key]


def pinned(recipe: Recipe) -> Recipe:
    """Write hash and mode of the recipe's learned prompts into the recipe, so that its key stands for them.

    Raises:
        InputError: there is no such file, it has no such mode, or its hash is not the one in the recipe.
        ModelError: it is damaged.
    """
    if recipe.learned is None:
        return recipe
    learned = load_learned(recipe.learned.path)
    learned.check_content(recipe.learned)
    mode = learned.mode(recipe.learned)
    known = dataclasses.replace(recipe.learned, mode="" if mode == "all" else mode, sha256=learned.sha256)
    return dataclasses.replace(recipe, learned=known)


def save_learned(
    folder: Path, about: Mapping[str, object], branches: Sequence[Mapping[str, NDArray[np.float32]]]
) -> LearnedPrompts:
    """Write a prompt file; the same content gives the same bytes.

    Args:
        folder: an existing folder.
        about: the provenance.
        branches: each branch's tensors by name: ``embedding`` and those of its kind.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    tensors = {
        f"{k}.{name}": np.ascontiguousarray(value, np.float32)
        for k, branch in enumerate(branches)
        for name, value in sorted(branch.items())
    }
    # All in one metadata entry: safetensors writes several in no fixed order, and the bytes would differ.
    text = json.dumps({"schema": SCHEMA, **about}, sort_keys=True)
    write_atomic(folder / PROMPT_FILE, save(tensors, metadata={_KEY: f"{text}\n{_content(text, tensors)}"}))
    return load_learned(folder)
