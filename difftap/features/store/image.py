"""An image's maps as a store keeps them: encoded, and hashed; the part of storing that needs no store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from difftap.coords import Geometry
from difftap.engine import Features
from difftap.features.store.encoding import Basis, Encoding, Stored

__all__ = ["StoredImage", "row_digest", "shapes_of", "store_image"]


@dataclass(frozen=True)
class StoredImage:
    """What goes into one row of a store's arrays.

    Attributes:
        features: what it was made of.
        maps: as they are stored, by array name, ``branch/tap``.
        sha256: of what is stored (`row_digest`), by array name.
    """

    features: Features
    maps: Mapping[str, Stored]
    sha256: Mapping[str, str]

    @property
    def geometry(self) -> Geometry:
        """Where the image lies on its maps."""
        return next(iter(self.features.branches[0].values())).geometry


def store_image(features: Features, encoding: Encoding, bases: Mapping[str, Basis]) -> StoredImage:
    """Encode an image's maps.

    Args:
        features: of the image.
        encoding: how the store keeps maps.
        bases: of a store with PCA, by array name.

    Raises:
        InputError: a value does not fit the store's number type.
    """
    maps = {
        f"{number}/{tap}": encoding.encode(one.data, bases.get(f"{number}/{tap}"))
        for number, taps in enumerate(features.branches)
        for tap, one in taps.items()
    }
    return StoredImage(features, maps, {name: row_digest(one) for name, one in maps.items()})


def row_digest(stored: Stored) -> str:
    """The first half of the SHA-256 of what is stored of one map: values, then scales."""
    digest = hashlib.sha256(np.ascontiguousarray(stored.values).data)
    if stored.scale is not None:
        digest.update(np.ascontiguousarray(stored.scale).data)
    return digest.hexdigest()[:32]


def shapes_of(features: Features) -> dict[str, tuple[int, int, int]]:
    """``(C, h, w)`` of each map, by array name."""
    return {
        f"{number}/{tap}": (one.data.shape[0], one.data.shape[1], one.data.shape[2])
        for number, taps in enumerate(features.branches)
        for tap, one in taps.items()
    }
