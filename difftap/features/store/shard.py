"""One shard of a store while it is being filled: rows gather in memory and go to disk together.

The order is what makes a store survive: first the shard's data, then its page of the journal, each written whole. A
process killed in between leaves data that no page names; the next one writes over it. A shard that is committed before
it is full is written again, with what came in since; its earlier rows are the same bytes, so nothing is at risk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.features.store.encoding import Basis, Fidelity, Stored
from difftap.features.store.image import StoredImage
from difftap.features.store.log import Failure, Page, Row
from difftap.features.store.place import Place
from difftap.features.store.schema import Provenance, TapArray

__all__ = ["Shard", "create_arrays", "shard_rows"]

SHARD_BYTES = 64 << 20
CHUNK_BYTES = 256 << 10
MOST_ROWS = 256


def shard_rows(row_bytes: int) -> int:
    """Rows a shard: a power of two that makes some 64 MB, at most 256.

    >>> shard_rows(1280 * 48 * 48 * 2)
    8
    """
    return 1 << (max(1, min(MOST_ROWS, SHARD_BYTES // max(1, row_bytes))).bit_length() - 1)


def _chunk_rows(row_bytes: int, shard: int) -> int:
    """Rows a chunk: one of large maps, more of small ones, so that handling chunks costs little; divides the shard."""
    wanted = max(1, min(shard, CHUNK_BYTES // max(1, row_bytes)))
    return max(rows for rows in range(1, wanted + 1) if shard % rows == 0)


def create_arrays(
    group: Any,
    provenance: Provenance,
    shapes: Mapping[str, tuple[int, int, int]],
    bases: Mapping[str, Basis],
    rows: int,
) -> None:
    """Make the arrays of the taps that are not there yet.

    Args:
        shapes: ``(C, h, w)`` by array name.
        rows: the first axis; a multiple of the shard.
    """
    encoding = provenance.encoding
    for name, (channels, height, width) in shapes.items():
        kept = channels if encoding.pca is None else len(bases[name].components)
        if encoding.pca is not None:
            basis = bases[name]
            _put(group, f"{name}.mean", basis.mean)
            _put(group, f"{name}.components", basis.components, {"share": basis.share})
        scales = encoding.scales(kept)
        if scales:
            chunk = _chunk_rows(4 * scales, provenance.shard)
            _make(group, f"{name}.scale", (rows, scales), "float32", provenance.shard, chunk, ("row", "channel"))
        chunk = _chunk_rows(kept * height * width * np.dtype(encoding.dtype).itemsize, provenance.shard)
        shape = (rows, kept, height, width)
        _make(group, name, shape, encoding.dtype, provenance.shard, chunk, ("row", "channel", "y", "x"))


def _make(
    group: Any, name: str, shape: tuple[int, ...], dtype: str, shard: int, chunk: int, axes: tuple[str, ...]
) -> None:
    if name not in group:
        group.create_array(
            name,
            shape=shape,
            shards=(shard, *shape[1:]),
            chunks=(chunk, *shape[1:]),
            dtype=dtype,
            compressors=None,  # features are noise to a compressor: a tenth at best, for most of the time
            fill_value=0,
            dimension_names=axes,
        )


def _put(group: Any, name: str, data: NDArray[Any], attributes: Mapping[str, Any] | None = None) -> None:
    """A small array, written whole."""
    group.create_array(name, data=data, compressors=None, attributes=dict(attributes or {}), overwrite=True)


class Shard:
    """The rows of one shard.

    Args:
        group: the store's zarr group, open for writing.
        place: where it lies.
        provenance: how it stores.
        arrays: its taps; their first axis reaches over the whole shard.
        number: which shard.
        page: what an earlier run committed of it.
        room: the arrays that an earlier shard of this run gathered its rows in, to be used again: the first touch of
            fresh memory takes longer than all else that is done to a row.
    """

    def __init__(
        self,
        group: Any,
        place: Place,
        provenance: Provenance,
        arrays: Sequence[TapArray],
        number: int,
        page: Page | None = None,
        room: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._group = group
        self._place = place
        self._provenance = provenance
        self._arrays = list(arrays)
        self.number = number
        self._rows = list(page.rows) if page else []
        self._failures = list(page.failures) if page else []
        self._safe = len(self._rows) + len(self._failures)
        self._spare = dict(room or {})
        self._values: dict[str, NDArray[Any]] = {}
        self._scales: dict[str, NDArray[np.float32]] = {}

    @property
    def full(self) -> bool:
        """Whether no row is left."""
        return len(self._rows) >= self._provenance.shard

    @property
    def pending(self) -> int:
        """Records that are not on disk yet."""
        return len(self._rows) + len(self._failures) - self._safe

    def use(self, arrays: Sequence[TapArray]) -> None:
        """Tell which arrays there are, once the first features have told their shapes."""
        self._arrays = list(arrays)

    def add(self, key: str, image: StoredImage) -> None:
        """Take an image's maps.

        Raises:
            InputError: the maps have other shapes than the arrays.
        """
        encoding = self._provenance.encoding
        names = {array.name for array in self._arrays}
        if names != set(image.maps):
            raise InputError(
                f"'{key}' has maps of {', '.join(image.maps)}, the store arrays of {', '.join(sorted(names)) or 'none'}"
            )
        place = len(self._rows)
        fidelity: dict[str, dict[str, float]] = {}
        for array in self._arrays:
            one = image.maps[array.name]
            if one.values.shape != array.values.shape[1:]:
                raise InputError(
                    f"'{array.name}' of '{key}' is stored as {one.values.shape}, but the store's rows are "
                    f"{tuple(array.values.shape[1:])}; a store holds maps of one shape"
                )
            if place == 0:  # the first of each shard is measured
                data = image.features.branches[array.branch][array.tap].data
                fidelity[array.name] = Fidelity.measure(data, encoding.decode(one, array.basis)).to_dict()
        self._keep(image.maps)
        geometry = image.geometry
        self._rows.append(
            Row(
                self.number * self._provenance.shard + place,
                key,
                image.features.digest,
                geometry.image,
                geometry.content,
                dict(image.sha256),
                fidelity,
            )
        )

    def copy(self, row: Row, stored: Mapping[str, Stored]) -> None:
        """Take a row of another store, or of another place in this one, as it is."""
        self._keep(stored)
        number = self.number * self._provenance.shard + len(self._rows)
        self._rows.append(Row(**{**vars(row), "row": number}))

    def fail(self, key: str, error: str) -> None:
        """Record that an image could not be used."""
        self._failures.append(Failure(key, " ".join(error.split())))

    def _buffer(self, array: TapArray) -> None:
        """Room for a whole shard; what an earlier run wrote is read back."""
        start = self.number * self._provenance.shard
        stop = start + self._provenance.shard
        for kept, source in ((self._values, array.values), (self._scales, array.scale)):
            if source is None or array.name in kept:
                continue
            room = self._spare.pop(f"{array.name}.scale" if source is array.scale else array.name, None)
            if room is None:
                room = np.zeros((self._provenance.shard, *source.shape[1:]), source.dtype)
            if self._safe and self._rows:
                room[: len(self._rows)] = source[start:stop][: len(self._rows)]
            kept[array.name] = room

    def _keep(self, stored: Mapping[str, Stored]) -> None:
        place = len(self._rows)
        for array in self._arrays:
            self._buffer(array)
            one = stored[array.name]
            self._values[array.name][place] = one.values
            if one.scale is not None:
                self._scales[array.name][place] = one.scale

    @property
    def room(self) -> dict[str, NDArray[Any]]:
        """The arrays that rows gather in, for the next shard once this one is on disk."""
        return {**self._values, **{f"{name}.scale": scale for name, scale in self._scales.items()}}

    def commit(self) -> int:
        """Put everything on disk; returns how many records became safe by it.

        Raises:
            OutputError: it cannot be written; what was safe stays safe.
        """
        count = self.pending
        if not count:
            return 0
        start = self.number * self._provenance.shard
        stop = start + self._provenance.shard
        for kept in (*self._values.values(), *self._scales.values()):
            kept[len(self._rows) :] = 0  # what is there may be an earlier shard's
        with self._place.errors():
            for array in self._arrays:
                if array.name in self._values:  # none, where all that came in are failures
                    values = array.values
                    if self.full:  # zarr would compare every chunk with the fill value, to leave empty ones out
                        values = values.with_config({"write_empty_chunks": True})
                    values[start:stop] = self._values[array.name]
                if array.name in self._scales and array.scale is not None:
                    array.scale[start:stop] = self._scales[array.name]
            self._group["journal"][self.number] = Page(tuple(self._rows), tuple(self._failures)).text()
        self._safe += count
        return count
