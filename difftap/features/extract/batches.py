"""Give features as batches of arrays for the user's own loop, as numpy arrays or through a torch data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Geometry
from difftap.engine import Features
from difftap.errors import InputError, require
from difftap.features.extract.stream import Opened, stream
from difftap.features.sources import FileAt, Item, Source, open_source
from difftap.images import Image

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import IterableDataset

__all__ = ["Batch", "Extractor"]


@dataclass(frozen=True)
class Batch:
    """The features of B images.

    Attributes:
        keys: the images' keys, B of them.
        digests: the digests of their pixels.
        geometries: how each image lies on the input; they convert between its pixels and cells.
        maps: each tap's maps, float32 ``(B, C, h, w)``, by ``branch/tap``: ``maps["0/up1"]``.
    """

    keys: tuple[str, ...]
    digests: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    maps: dict[str, NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """Return a tap's maps ``(B, C, h, w)``, by ``branch/tap``, or by the tap's name if only one branch has it.

        Raises:
            InputError: there is no such tap, or several branches have it.
        """
        fits = [full for full in self.maps if name in (full, full.split("/", 1)[1])]
        if len(fits) != 1:
            raise InputError(f"'{name}' names {len(fits)} taps; allowed: {', '.join(self.maps)}")
        return self.maps[fits[0]]


@dataclass(frozen=True)
class _Given:
    """The place of an image that is in memory already."""

    image: Image

    def load(self) -> Image:
        return self.image


OneImage = Image | Item | str | Path | NDArray[np.uint8]
Images = str | Path | Source | Iterable[OneImage]
"""What `Extractor` takes: a path that `difftap.features.sources.open_source` reads, a source, or single images."""


class Extractor:
    """Iterate over batches of features; the next batches are made while one is used.

    Decoding and the networks run in their own threads, a few images ahead. An `Extractor` can be iterated again if its
    images can. An image that cannot be used is left out and listed in `failures`.

    Args:
        pipeline: an open `difftap.Pipeline`; it stays open.
        images: the path of a folder, glob, list, tar or table; or an iterable of `difftap.Image`, paths, or uint8
            arrays ``(H, W, 3)``, RGB.
        size: images per batch; the last batch may be smaller.
        workers: threads that decode.
        strict: raise the error of an image that cannot be used, instead of leaving it out.

    Attributes:
        failures: key -> reason of each image that was left out.

    Raises:
        InputError: ``size`` is below 1.

    >>> import difftap, numpy as np
    >>> pictures = np.zeros((3, 48, 64, 3), np.uint8)                       # (N, H, W, 3)
    >>> recipe = difftap.load_recipe("pocket")
    >>> with difftap.Pipeline.open(recipe) as pipeline:
    ...     for batch in difftap.Extractor(pipeline, pictures, size=2):
    ...         print(batch.keys, batch["up2"].shape)                       # (B, C, h, w)
    ('0', '1') (2, 160, 32, 32)
    ('2',) (1, 160, 32, 32)
    """

    def __init__(
        self, pipeline: Opened, images: Images, size: int = 8, *, workers: int = 2, strict: bool = False
    ) -> None:
        if size < 1:
            raise InputError(f"size is {size}; allowed: 1 or more images a batch")
        self._pipeline = pipeline
        self._images: Iterable[OneImage] = open_source(images) if isinstance(images, str | Path) else images
        self._size = size
        self._workers = workers
        self._strict = strict
        self.failures: dict[str, str] = {}

    def _items(self) -> Iterator[Item]:
        for number, one in enumerate(self._images):
            if isinstance(one, Item):
                yield one
            elif isinstance(one, str | Path):
                yield Item(str(one), FileAt(str(one)))
            elif isinstance(one, Image):
                yield Item(str(number) if one.path == "<array>" else one.path, _Given(one))
            else:
                yield Item(str(number), _Given(Image(np.asarray(one))))

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[tuple[str, Features]] = []
        with closing(stream(self._pipeline, self._items(), self._workers)) as outcomes:
            for outcome in outcomes:
                if outcome.features is None:
                    self.failures[outcome.item.key] = str(outcome.fault)
                    if self._strict and outcome.fault is not None:
                        raise outcome.fault
                    continue
                waiting.append((outcome.item.key, outcome.features))
                if len(waiting) == self._size:
                    yield _batch(waiting)
                    waiting = []
        if waiting:
            yield _batch(waiting)

    def torch(self) -> IterableDataset[dict[str, Tensor | list[str]]]:
        """Give the batches as a torch data set, for ``DataLoader(data, batch_size=None, num_workers=0)``.

        Its items are dictionaries: each ``branch/tap`` has a tensor float32 ``(B, C, h, w)``, and ``keys`` has the
        list of keys. It works only in the loader's own process, because engines cannot be copied to others.

        Raises:
            MissingExtraError: torch is not installed.
        """
        torch = require("torch", "export", "a torch data set")
        outer = self

        class Features(torch.utils.data.IterableDataset):  # type: ignore[name-defined,misc]
            def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
                if torch.utils.data.get_worker_info() is not None:
                    raise InputError("engines cannot be shared with worker processes; give the loader num_workers=0")
                for batch in outer:
                    tensors = {name: torch.from_numpy(value) for name, value in batch.maps.items()}
                    yield {**tensors, "keys": list(batch.keys)}

        data: IterableDataset[dict[str, Tensor | list[str]]] = Features()
        return data


def _batch(waiting: list[tuple[str, Features]]) -> Batch:
    keys = tuple(key for key, _ in waiting)
    every = [features for _, features in waiting]
    names = [(number, tap) for number, taps in enumerate(every[0].branches) for tap in taps]
    maps = {f"{number}/{tap}": np.stack([one.branches[number][tap].data for one in every]) for number, tap in names}
    geometries = tuple(next(iter(one.branches[0].values())).geometry for one in every)
    return Batch(keys, tuple(one.digest for one in every), geometries, maps)
