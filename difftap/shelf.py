"""A shelf of features: each image's map is made once and kept as long as some pair still needs it."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.coords import Geometry
from difftap.errors import DifftapError, ImageError, NonFiniteError
from difftap.features import FeatureMap
from difftap.images import Image, load_image
from difftap.manifest import output_errors
from difftap.pipeline import Pipeline
from difftap.results import image_record

__all__ = ["FeatureShelf"]


class FeatureShelf:
    """Each image's joined map, from when it is first needed to when no pair needs it any more.

    At most ``budget`` bytes stay in memory; what is used least recently beyond that lies in a scratch folder.

    Args:
        pipeline: makes the maps.
        order: the images in the order they will be asked for, once for every use.
        budget: bytes of maps to keep in memory; the two in use stay whatever they take.
        scratch: an existing folder for the rest.
    """

    def __init__(self, pipeline: Pipeline, order: Sequence[Path], budget: int, scratch: Path) -> None:
        self._pipeline = pipeline
        self._order = list(order)
        self._uses = Counter(order)
        self._budget = budget
        self._scratch = scratch
        self._maps: OrderedDict[Path, FeatureMap] = OrderedDict()
        self._spilled: dict[Path, tuple[Path, Geometry]] = {}
        self._records: dict[Path, dict[str, Any]] = {}
        self._faults: dict[Path, DifftapError] = {}
        self._cursor = 0

    def record(self, path: Path) -> dict[str, Any]:
        """What identifies the image; it must have been got before."""
        return self._records[path]

    def get(self, path: Path, ahead: int) -> FeatureMap:
        """An image's map, made with those of up to ``ahead`` images that come next if it is not there yet.

        Raises:
            DifftapError: the image cannot be used; the same each time it is asked for.
        """
        if path not in self._maps and path not in self._spilled and path not in self._faults:
            self._make(path, ahead)
        if path in self._faults:
            raise self._faults[path]
        if path not in self._maps:
            file, geometry = self._spilled.pop(path)
            self._keep(path, FeatureMap(np.load(file, allow_pickle=False), geometry))
            file.unlink()
        self._maps.move_to_end(path)
        return self._maps[path]

    def release(self, *paths: Path) -> None:
        """One use of each image is over; drop what has no use left."""
        for path in paths:
            self._uses[path] -= 1
            if self._uses[path] <= 0:
                self._maps.pop(path, None)
                if path in self._spilled:
                    self._spilled.pop(path)[0].unlink()

    def _make(self, path: Path, ahead: int) -> None:
        wanted = [path]
        for other in dict.fromkeys(self._order[self._cursor :]):
            if len(wanted) >= ahead:
                break
            known = other in self._maps or other in self._spilled or other in self._faults
            if other not in wanted and not known and self._uses[other] > 0:
                wanted.append(other)
        images: dict[Path, Image] = {}
        for one in wanted:
            try:
                images[one] = load_image(one)
                self._records[one] = image_record(images[one])
            except ImageError as error:
                self._faults[one] = error
        try:
            for one, features in zip(images, list(self._pipeline.extract(images.values())), strict=True):
                self._keep(one, features)
        except NonFiniteError:
            # One of them spoils the batch; alone, each gets its own features or its own fault.
            for one, image in images.items():
                try:
                    self._keep(one, next(iter(self._pipeline.extract([image]))))
                except NonFiniteError as error:
                    self._faults[one] = error

    def advance(self, count: int) -> None:
        """Tell how many entries of the order are over."""
        self._cursor = count

    def _keep(self, path: Path, features: FeatureMap) -> None:
        self._maps[path] = features
        while len(self._maps) > 2 and sum(m.data.nbytes for m in self._maps.values()) > self._budget:
            oldest, spilled = self._maps.popitem(last=False)
            file = self._scratch / f"{hashlib.sha256(str(oldest).encode()).hexdigest()[:32]}.npy"
            with output_errors(file):
                np.save(file, spilled.data)
            self._spilled[oldest] = (file, spilled.geometry)
