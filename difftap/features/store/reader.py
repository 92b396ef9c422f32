"""Read a feature store: find an image by its key or by its content, and read its features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.engine import Features
from difftap.errors import ArtifactError, InputError
from difftap.featuremap import FeatureMap
from difftap.features.store.encoding import EncodedMap, row_digest
from difftap.features.store.place import Place, StoreGroup
from difftap.features.store.schema import (
    Provenance,
    StoredRow,
    TapArray,
    check_features,
    keys_of,
    pages,
    read_provenance,
    tap_arrays,
)
from difftap.recipe import Recipe

__all__ = ["FeatureStore"]


class FeatureStore:
    """An extracted data set, open for reading. If it is still being written, it shows what it held when opened.

    Attributes:
        place: its address.
        provenance: what it holds and what made it.
        group: the zarr group.

    For instance::

        store = FeatureStore.open("features.zarr")
        features = store.read("cats/1.jpg")
        features.branches[0]["up1"].data  # (C, h, w), float32
    """

    def __init__(self, group: StoreGroup, place: Place, provenance: Provenance) -> None:
        self.group = group
        self.place = place
        self.provenance = provenance
        self._rows, self._by_key, self._failures = self._load()

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open a store: a local folder, or any address that fsspec knows (``s3://bucket/features.zarr``).

        Raises:
            InputError: there is no feature store.
            ArtifactError: the store is damaged.
            MissingExtraError: zarr is not installed.
        """
        place = Place(path)
        group = place.open()
        if group is None:
            raise InputError(f"no feature store at '{path}'; make one with: difftap extract IMAGES -o {path}")
        return cls(group, place, read_provenance(group, place))

    def _load(self) -> tuple[list[StoredRow], dict[str, int], dict[str, str]]:
        everything = list(pages(self.group, self.place))
        rows = [row for page in everything for row in page.rows]
        _, failed = keys_of(everything)
        return rows, {row.key: index for index, row in enumerate(rows)}, failed

    @cached_property
    def taps(self) -> tuple[TapArray, ...]:
        """The arrays, branch by branch and tap by tap; empty if the store holds no image yet."""
        return tuple(tap_arrays(self.group, self.provenance, self.place))

    @cached_property
    def _by_digest(self) -> dict[str, str]:
        return {row.digest: row.key for row in reversed(self._rows)}  # reversed: the first of equal images wins

    @property
    def rows(self) -> tuple[StoredRow, ...]:
        """Every image in the store, in the order of the rows."""
        return tuple(self._rows)

    @property
    def failures(self) -> Mapping[str, str]:
        """The reason for each image that could not be used, by key."""
        return self._failures

    @property
    def holes(self) -> int:
        """The number of rows below the last one that hold no image."""
        return max((row.row + 1 for row in self._rows), default=0) - len(self._rows)

    @property
    def noted(self) -> JsonObject:
        """The store's own description: its provenance, the runs that filled it, whether it is complete."""
        return dict(dict(self.group.attrs)["difftap"])

    def check(self, recipe: Recipe, model_key: str, prompts: Mapping[str, object] | None = None) -> None:
        """Check that these are the features of a recipe.

        Args:
            recipe: the recipe. Its matcher, and how it joins branches, are not compared. Learned prompts in it must be
                replaced by the digest of their file, as in `difftap.Pipeline.recipe`.
            model_key: the model's key, `difftap.engine.model_key`.
            prompts: kind, mode and hash of the recipe's learned prompts, `difftap.prompts.PromptBook.conditions`.

        Raises:
            RecipeError: they are not; the message names the first field that differs.
        """
        check_features(self.place, self.provenance, recipe.feature_fields(), model_key, prompts)

    def keys(self) -> list[str]:
        """Return the images' keys, in the order of the rows."""
        return [row.key for row in self._rows]

    def find(self, digest: str) -> str | None:
        """Find the key of the image with this content (`difftap.images.Image.digest`); None if the store lacks it."""
        return self._by_digest.get(digest)

    def row(self, key: str) -> StoredRow:
        """Look up an image in the journal.

        Raises:
            InputError: there is no such key, or the image could not be used.
        """
        index = self._by_key.get(key)
        if index is not None:
            return self._rows[index]
        if key in self._failures:
            raise InputError(f"image '{key}' could not be used when '{self.place}' was made: {self._failures[key]}")
        shown = ", ".join(f"'{known}'" for known in list(self._by_key)[:3])
        raise InputError(
            f"no image '{key}' in '{self.place}'; there are {len(self)}" + (f": {shown}, ..." if shown else "")
        )

    def read(self, key: str) -> Features:
        """Read an image's features: the map of every branch and tap, float32 ``(C, h, w)`` with its geometry.

        Raises:
            InputError: there is no such key, or the image could not be used.
            ArtifactError: its data cannot be read, or have changed.
        """
        return self._features(self.row(key))

    def _features(self, row: StoredRow) -> Features:
        geometry = row.geometry(self.provenance.size)
        branches: list[dict[str, FeatureMap]] = [{} for _ in self.provenance.branches]
        for array in self.taps:
            stored = self.stored(array, row.row)
            # zarr gives zeros for a missing chunk, and does not notice bytes that have changed.
            if row_digest(stored) != row.sha256.get(array.name):
                raise ArtifactError(
                    f"'{array.name}' of '{row.key}' in '{self.place}' is damaged (SHA-256 differs); 'difftap store "
                    "verify' finds all such images, 'difftap store compact --drop-damaged' leaves them out"
                )
            data = self.provenance.encoding.decode(stored, array.basis)
            branches[array.branch][array.tap] = FeatureMap(data, geometry)
        return Features(row.digest, tuple(branches))

    def stored(self, array: TapArray, row: int) -> EncodedMap:
        """Read one row of an array as it is stored.

        Raises:
            ArtifactError: it cannot be read.
        """
        try:
            values: NDArray[np.number] = np.asarray(array.values[row])
            scale = None if array.scale is None else np.asarray(array.scale[row])
        except Exception as error:  # zarr and file systems raise errors of many kinds for damaged chunks
            raise ArtifactError(
                f"row {row} of '{array.name}' in '{self.place}' cannot be read ({type(error).__name__}: {error}); "
                "'difftap store verify' finds every such row"
            ) from error
        return EncodedMap(values, scale)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, index: int) -> Features:
        """Read the features of image ``index`` of `keys`; with this, torch's loaders accept a store as a data set."""
        return self._features(self._rows[index])

    def __iter__(self) -> Iterator[Features]:
        return map(self._features, self._rows)
