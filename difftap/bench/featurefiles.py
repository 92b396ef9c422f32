"""Extracted maps kept in files between runs, with where they came from.

A folder holds one folder a provenance (everything that decides the maps, prompts included), named by its hash; in it
``provenance.json`` and one file an image, named by the hash of its pixels. The maps are those of the branches, before
they are joined, so recipes that differ in joining or matching alone share them. Files appear whole or not at all; a
damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.coords import Geometry
from difftap.errors import ArtefactError
from difftap.features import FeatureMap
from difftap.images import Image
from difftap.manifest import atomic_path, output_errors, write_atomic
from difftap.pipeline import Pipeline

__all__ = ["FeatureFiles", "branch_maps"]

_LOG = logging.getLogger("difftap")
SCHEMA = "difftap.bench.features/1"


class FeatureFiles:
    """The maps of one pipeline.

    Args:
        folder: where maps of all provenances are kept; made if it is not there.
        pipeline: what makes them.

    Attributes:
        provenance: everything that decides the maps.
        folder: where these are.

    Raises:
        ArtefactError: the folder of this provenance says that it holds something else.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        recipe, at = pipeline.recipe, pipeline.conditions
        self.provenance: dict[str, Any] = {
            "schema": SCHEMA,
            "features": recipe.feature_fields(),
            "model": at["model"],
            "backend": {name: at["backend"].get(name) for name in ("name", "version", "device", "precision")},
        }
        text = json.dumps(self.provenance, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._fit = recipe.fit
        self._size = recipe.size
        note = self.folder / "provenance.json"
        if note.exists():
            self._check(note)
            return
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(self.provenance, indent=1) + "\n")

    def _check(self, note: Path) -> None:
        try:
            same = json.loads(note.read_text(encoding="utf-8")) == json.loads(json.dumps(self.provenance))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"'{note}' cannot be read ({error}); remove the folder and run again") from error
        if not same:
            raise ArtefactError(f"'{self.folder}' holds features of another provenance; remove it and run again")

    def _path(self, image: Image) -> Path:
        return self.folder / f"{image.digest}.npz"

    def get(self, image: Image) -> tuple[FeatureMap, ...] | None:
        """An image's maps, branch by branch and tap by tap; None if they are not there or damaged."""
        path = self._path(image)
        if not path.is_file():
            return None
        lay = Geometry.stretch if self._fit == "stretch" else Geometry.letterbox
        geometry = lay(image.size, self._size)
        try:
            with (
                open(path, "rb") as handle,
                np.load(handle, allow_pickle=False) as data,
            ):  # the archive's checksums are verified on reading
                return tuple(FeatureMap(data[f"map{k}"], geometry) for k in range(len(data.files)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _LOG.warning("'%s' is damaged (%s) and is made again", path, error)
            return None

    def put(self, image: Image, maps: Sequence[FeatureMap]) -> None:
        """Keep an image's maps.

        Raises:
            OutputError: they cannot be written.
        """
        with atomic_path(self._path(image)) as scratch, open(scratch, "wb") as handle:
            arrays: Mapping[str, Any] = {f"map{k}": one.data for k, one in enumerate(maps)}
            np.savez(handle, **arrays)


def branch_maps(
    pipeline: Pipeline, images: Sequence[Image], files: FeatureFiles | None
) -> Iterator[tuple[FeatureMap, ...]]:
    """Each image's maps, in order: from files where they are kept, else extracted, and kept."""
    known = [files.get(image) if files else None for image in images]
    fresh = pipeline.features([image for image, maps in zip(images, known, strict=True) if maps is None])
    for image, maps in zip(images, known, strict=True):
        if maps is None:
            maps = tuple(one for taps in next(fresh).branches for one in taps.values())
            if files:
                files.put(image, maps)
        yield maps
