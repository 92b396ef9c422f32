"""Feature maps of a benchmark's images: each made once, kept while some pair still needs it, in bounded memory.

A view is an image file, perhaps flipped left to right; its maps are what one pipeline makes of it (several where the
branches stay apart). The order of use is known beforehand, so what is needed last is what leaves memory first.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftap.coords import Geometry, Size
from difftap.errors import DifftapError, ImageError, NonFiniteError
from difftap.features import FeatureMap
from difftap.images import Image, load_image
from difftap.manifest import output_errors

__all__ = ["Made", "MapShelf", "View", "load_view"]


@dataclass(frozen=True)
class View:
    """An image as a benchmark uses it.

    Attributes:
        path: the file.
        mirrored: flipped left to right.
    """

    path: Path
    mirrored: bool = False


def load_view(view: View) -> Image:
    """The image, flipped if the view says so.

    Raises:
        ImageError: it cannot be read.
    """
    image = load_image(view.path)
    return Image(np.ascontiguousarray(image.pixels[:, ::-1]), image.path) if view.mirrored else image


@dataclass(frozen=True)
class Made:
    """One view's maps.

    Attributes:
        maps: in the order of the recipe's branches and taps, or the one joined map.
        size: ``(W, H)`` of the image as it was decoded.
    """

    maps: tuple[FeatureMap, ...]
    size: Size

    @property
    def nbytes(self) -> int:
        """Memory of the maps, in bytes."""
        return sum(one.data.nbytes for one in self.maps)


class MapShelf:
    """Maps of views, made when first needed, dropped when no use is left.

    Args:
        make: from views to their maps, or to the fault that keeps a view from having any, in order.
        order: the views in the order they will be asked for, once for every use.
        budget: bytes of maps to keep in memory; the two in use stay whatever they take.
        scratch: an existing folder for the rest.
        ahead: views made together, the ones needed next.
    """

    def __init__(
        self,
        make: Callable[[Sequence[View]], Iterator[Made | DifftapError]],
        order: Sequence[View],
        budget: int,
        scratch: Path,
        ahead: int = 1,
    ) -> None:
        self._make = make
        self._budget = budget
        self._scratch = scratch
        self._ahead = ahead
        self._order = list(order)
        self._next: dict[View, deque[int]] = {}
        for place, view in enumerate(self._order):
            self._next.setdefault(view, deque()).append(place)
        self._cursor = 0
        self._kept: dict[View, Made] = {}
        self._spilled: dict[View, tuple[list[tuple[Path, Geometry]], Size]] = {}
        self._faults: dict[View, DifftapError] = {}
        self.made = 0

    def get(self, view: View) -> Made:
        """A view's maps.

        Raises:
            DifftapError: the view cannot be used; the same each time it is asked for.
        """
        if view not in self._kept and view not in self._spilled and view not in self._faults:
            self._fill(view)
        if view in self._faults:
            raise self._faults[view]
        if view not in self._kept:
            files, size = self._spilled.pop(view)
            maps = tuple(FeatureMap(np.load(file, allow_pickle=False), geometry) for file, geometry in files)
            for file, _ in files:
                file.unlink()
            self._keep(view, Made(maps, size))
        return self._kept[view]

    def holds(self, view: View) -> bool:
        """Whether a view's maps are in memory."""
        return view in self._kept

    def done(self, *views: View) -> list[View]:
        """One use of each view is over; drops, and names, those that have no use left."""
        self._cursor += len(views)
        gone = []
        for view in views:
            places = self._next[view]
            if places:
                places.popleft()
            if not places:
                self._kept.pop(view, None)
                for file, _ in self._spilled.pop(view, ([], (0, 0)))[0]:
                    file.unlink()
                gone.append(view)
        return gone

    def _fill(self, view: View) -> None:
        wanted = {view: None}
        for other in self._order[self._cursor : self._cursor + 64 * self._ahead]:
            if len(wanted) >= self._ahead:
                break
            if other not in self._kept and other not in self._spilled and other not in self._faults:
                wanted.setdefault(other)
        try:
            everything = list(self._make(list(wanted)))
        except NonFiniteError as error:
            if len(wanted) == 1:
                self._faults[view] = error
                return
            # One of them spoils the batch; alone, each gets its own maps or its own fault.
            for one in wanted:
                self._fill_alone(one)
            return
        for one, made in zip(wanted, everything, strict=True):
            if isinstance(made, DifftapError):
                self._faults[one] = made
            else:
                self.made += 1
                self._keep(one, made)

    def _fill_alone(self, view: View) -> None:
        try:
            (made,) = self._make([view])
        except NonFiniteError as error:
            made = error
        if isinstance(made, DifftapError):
            self._faults[view] = made
        else:
            self.made += 1
            self._keep(view, made)

    def _keep(self, view: View, made: Made) -> None:
        self._kept[view] = made
        total = sum(one.nbytes for one in self._kept.values())
        while len(self._kept) > 2 and total > self._budget:
            # What was just made may be needed at once; of the others, the one that is needed last goes.
            last = max((one for one in self._kept if one != view), key=self._distance)
            spilled = self._kept.pop(last)
            total -= spilled.nbytes
            self._spilled[last] = (self._spill(last, spilled), spilled.size)

    def _distance(self, view: View) -> int:
        places = self._next[view]
        return places[0] if places else len(self._order)

    def _spill(self, view: View, made: Made) -> list[tuple[Path, Geometry]]:
        stem = hashlib.sha256(f"{view.mirrored}:{view.path}".encode()).hexdigest()[:32]
        files = []
        for k, one in enumerate(made.maps):
            file = self._scratch / f"{stem}.{k}.npy"
            with output_errors(file):
                np.save(file, one.data)
            files.append((file, one.geometry))
        return files


def extractor(
    features: Callable[[Sequence[Image]], Iterator[tuple[FeatureMap, ...]]],
) -> Callable[[Sequence[View]], Iterator[Made | DifftapError]]:
    """What `MapShelf` needs, from what makes maps of decoded images; an unreadable image becomes its fault."""

    def make(views: Sequence[View]) -> Iterator[Made | DifftapError]:
        images: list[Image | ImageError] = []
        for view in views:
            try:
                images.append(load_view(view))
            except ImageError as error:
                images.append(error)
        maps = features([image for image in images if isinstance(image, Image)])
        for image in images:
            yield image if isinstance(image, ImageError) else Made(next(maps), image.size)

    return make
