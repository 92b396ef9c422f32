"""Feature maps of many images: each made once, kept while some pair still needs it, in bounded memory.

A view is an image file, perhaps flipped left to right. What is kept of it may differ by more than the view (by prompt,
say), so the keeper takes any key. The order of use is known beforehand, so what is needed last leaves memory first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from difftap.artifacts.files import output_errors
from difftap.artifacts.memory import MemoryCache
from difftap.coords import Geometry, Size
from difftap.engine import finite_or_alone
from difftap.errors import DifftapError, NonFiniteError
from difftap.featuremap import FeatureMap
from difftap.images import Image, load_image
from difftap.matching import PreparedImage

__all__ = ["Generators", "ImageMaps", "MapKeeper", "View", "load_view"]

Key = TypeVar("Key", bound=Hashable)

Generators = Mapping[Path, Callable[[], None]]
"""Files that are no part of a data set, and what writes each when it is first needed."""


@dataclass(frozen=True)
class View:
    """An image as a pair uses it.

    Attributes:
        path: the file.
        mirrored: flipped left to right.
    """

    path: Path
    mirrored: bool = False


def load_view(view: View, generators: Generators | None = None) -> Image:
    """Load the image, made if it has to be, flipped if the view says so.

    Raises:
        ImageError: it cannot be read.
        OutputError: it had to be made and cannot be written.
    """
    if generators and view.path in generators and not view.path.exists():
        generators[view.path]()
    image = load_image(view.path)
    return Image(np.ascontiguousarray(image.pixels[:, ::-1]), image.path) if view.mirrored else image


@dataclass(frozen=True)
class ImageMaps:
    """One view's maps.

    Attributes:
        maps: in the order of the recipe's branches and taps, or the one joined map.
        size: ``(W, H)`` of the image as it was decoded.
        digest: SHA-256 of its pixels.
    """

    maps: tuple[FeatureMap, ...]
    size: Size
    digest: str = ""

    @property
    def nbytes(self) -> int:
        """Memory of the maps, in bytes."""
        return sum(one.data.nbytes for one in self.maps)


@dataclass
class _Kept:
    """Maps in memory, and what was made ready of them."""

    made: ImageMaps
    prepared: PreparedImage | None = None

    @property
    def nbytes(self) -> int:
        return self.made.nbytes + (0 if self.prepared is None else self.prepared.nbytes)


class MapKeeper(Generic[Key]):
    """Maps, made when first needed, dropped when no use is left.

    Args:
        make: from keys to their maps, or to the fault that keeps a key from having any, in order.
        prepare: makes maps ready for matching; kept with them.
        order: the keys in the order they will be asked for, once for every use.
        budget: bytes in memory of maps and of what was made ready; the two in use stay whatever they take.
        scratch: an existing folder for the rest.
        ahead: keys made together, the ones needed next.

    Attributes:
        made: how many were made.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Key]], Iterator[ImageMaps | DifftapError]],
        prepare: Callable[[Sequence[FeatureMap]], PreparedImage],
        order: Sequence[Key],
        budget: int,
        scratch: Path,
        ahead: int = 1,
    ) -> None:
        self._make = make
        self._prepare = prepare
        self._scratch = scratch
        self._ahead = ahead
        self._order = list(order)
        self._next: dict[Key, deque[int]] = {}
        for place, key in enumerate(self._order):
            self._next.setdefault(key, deque()).append(place)
        self._cursor = 0
        self._kept: MemoryCache[Key, _Kept] = MemoryCache(
            budget, lambda one: one.nbytes, next_use=self._distance, leaves=self._spill
        )
        self._spilled: dict[Key, tuple[list[tuple[Path, Geometry]], ImageMaps]] = {}
        self._faults: dict[Key, DifftapError] = {}
        self._files = 0
        self.made = 0

    def get(self, key: Key) -> ImageMaps:
        """Make a key's maps.

        Raises:
            DifftapError: there are none; the same each time it is asked for.
        """
        return self._get(key).made

    def prepared(self, key: Key) -> PreparedImage:
        """Prepare a key's maps for matching.

        Raises:
            DifftapError: as `get`.
        """
        kept = self._get(key)
        if kept.prepared is None:
            kept.prepared = self._prepare(kept.made.maps)
        return kept.prepared

    def holds(self, key: Key) -> bool:
        """Whether a key's maps are in memory."""
        return key in self._kept

    def done(self, *keys: Key) -> None:
        """One use of each key is over; drops those that have no use left."""
        self._cursor += len(keys)
        for key in keys:
            places = self._next[key]
            if places:
                places.popleft()
            if not places:
                self._kept.drop(key)
                for file, _ in self._spilled.pop(key, ([], None))[0]:
                    file.unlink()
        self._kept.trim()  # matching may have made norms that count, too

    def _get(self, key: Key) -> _Kept:
        if key not in self._kept and key not in self._spilled and key not in self._faults:
            self._fill(key)
        if key in self._faults:
            raise self._faults[key]
        if key not in self._kept:
            files, made = self._spilled.pop(key)
            maps = tuple(FeatureMap(np.load(file, allow_pickle=False), geometry) for file, geometry in files)
            for file, _ in files:
                file.unlink()
            self._kept.put(key, _Kept(ImageMaps(maps, made.size, made.digest)))
        return self._kept[key]

    def _fill(self, key: Key) -> None:
        wanted = {key: None}
        for other in self._order[self._cursor : self._cursor + 64 * self._ahead]:
            if len(wanted) >= self._ahead:
                break
            if other not in self._kept and other not in self._spilled and other not in self._faults:
                wanted.setdefault(other)
        for keys, made in finite_or_alone(lambda some: list(self._make(some)), list(wanted)):
            results = [made] if isinstance(made, NonFiniteError) else made
            for one, result in zip(keys, results, strict=True):
                self._take(one, result)

    def _take(self, key: Key, made: ImageMaps | DifftapError) -> None:
        if isinstance(made, DifftapError):
            self._faults[key] = made
            return
        self.made += 1
        self._kept.put(key, _Kept(made))  # it stays: it may be needed at once

    def _distance(self, key: Key) -> int:
        places = self._next[key]
        return places[0] if places else len(self._order)

    def _spill(self, key: Key, kept: _Kept) -> None:
        """Write maps that leave memory; what was made ready of them is made again."""
        files = []
        for one in kept.made.maps:
            file = self._scratch / f"{self._files}.npy"
            self._files += 1
            with output_errors(file):
                np.save(file, one.data)
            files.append((file, one.geometry))
        self._spilled[key] = (files, ImageMaps((), kept.made.size, kept.made.digest))
