"""Extracted maps kept in files between runs, with where they came from.

A folder holds one folder a provenance: everything that decides one branch's maps under one prompt, so that rows of a
table share the branches they have in common, whatever they join and match. It is named by the provenance's hash; in it
``provenance.json`` and one file an image, named by the hash of its pixels, with a map for each tap. Files appear whole
or not at all; a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.artifacts.files import atomic_path, output_errors, write_atomic
from difftap.coords import Geometry
from difftap.errors import ArtifactError, InputError
from difftap.featuremap import FeatureMap
from difftap.images import Image
from difftap.pipeline.pipeline import Provider
from difftap.prompts import Prompt, made_of_images

__all__ = ["BranchFiles", "provenance"]

_LOG = logging.getLogger("difftap")
SCHEMA = "difftap.bench.features/2"


def provenance(pipeline: Provider, branch: int, prompt: Prompt) -> dict[str, Any]:
    """Everything that decides one branch's maps under one prompt, and who made them."""
    recipe, at = pipeline.recipe, pipeline.conditions
    fields = recipe.feature_fields()
    learned = fields.pop("learned", None) and at["prompts"]
    text = prompt.text if prompt.row is None else {**learned, "branch": branch, "row": prompt.row}
    own = {**fields.pop("branches")[branch], "prompt": text}
    return {
        "schema": SCHEMA,
        "difftap": at["difftap"],
        "model": {**at["model"]},
        "backend": {name: at["backend"].get(name) for name in ("name", "version", "device", "precision")},
        "recipe": {name: value for name, value in fields.items() if name != "model"},
        "branch": own,
    }


class BranchFiles:
    """The maps of one pipeline's branches.

    Args:
        folder: where maps of all provenances are kept; made when the first is.
        pipeline: what makes them.
    """

    def __init__(self, folder: Path, pipeline: Provider) -> None:
        self._root = folder
        self._pipeline = pipeline
        self._folders: dict[tuple[int, Prompt], Path] = {}

    @classmethod
    def lasting(cls, folder: Path, pipeline: Provider) -> BranchFiles:
        """Keep maps for later runs.

        Raises:
            InputError: the prompts are made of images; such maps are of no use to another pair.
        """
        if made_of_images(pipeline.recipe):
            raise InputError(
                "maps under prompts made of images serve no other pair and are not kept in files; leave --features "
                "out, or take --prompt-mode class"
            )
        return cls(folder, pipeline)

    def folder(self, branch: int, prompt: Prompt) -> Path:
        """Where a branch's maps under a prompt are.

        Raises:
            ArtifactError: the folder of this provenance says that it holds something else.
            OutputError: the folder cannot be written.
        """
        if (branch, prompt) not in self._folders:
            said = provenance(self._pipeline, branch, prompt)
            text = json.dumps(said, sort_keys=True)
            place = self._root / hashlib.sha256(text.encode()).hexdigest()[:16]
            note = place / "provenance.json"
            if note.exists():
                _check(note, said)
            else:
                with output_errors(place):
                    place.mkdir(parents=True, exist_ok=True)
                write_atomic(note, json.dumps(said, indent=1) + "\n")
            self._folders[branch, prompt] = place
        return self._folders[branch, prompt]

    def get(self, image: Image, branch: int, prompt: Prompt) -> tuple[FeatureMap, ...] | None:
        """Read a branch's maps of an image, tap by tap; None if they are not there or damaged."""
        path = self.folder(branch, prompt) / f"{image.digest}.npz"
        if not path.is_file():
            return None
        recipe = self._pipeline.recipe
        geometry = Geometry.laid(recipe.fit, image.size, recipe.size)
        try:
            with (
                open(path, "rb") as handle,
                np.load(handle, allow_pickle=False) as data,
            ):  # the archive's checksums are verified on reading
                return tuple(FeatureMap(data[f"map{k}"], geometry) for k in range(len(recipe.branches[branch].taps)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _LOG.warning("'%s' is damaged (%s) and is made again", path, error)
            return None

    def put(self, image: Image, branch: int, prompt: Prompt, maps: Sequence[FeatureMap]) -> None:
        """Keep a branch's maps of an image.

        Raises:
            OutputError: they cannot be written.
        """
        path = self.folder(branch, prompt) / f"{image.digest}.npz"
        with atomic_path(path) as scratch, open(scratch, "wb") as handle:
            arrays: Mapping[str, Any] = {f"map{k}": one.data for k, one in enumerate(maps)}
            np.savez(handle, **arrays)

    def drop(self, image: Image, branch: int, prompt: Prompt) -> None:
        """Remove a branch's maps of an image, if they are there."""
        (self.folder(branch, prompt) / f"{image.digest}.npz").unlink(missing_ok=True)


def _check(note: Path, said: Mapping[str, Any]) -> None:
    try:
        same = json.loads(note.read_text(encoding="utf-8")) == json.loads(json.dumps(said))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{note}' cannot be read ({error}); remove the folder and run again") from error
    if not same:
        raise ArtifactError(f"'{note.parent}' holds features of another provenance; remove it and run again")
