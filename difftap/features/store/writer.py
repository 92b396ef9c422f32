"""Writing a feature store: begun or taken up again, filled shard by shard, finished.

What `StoreWriter.put` and `StoreWriter.fail` take is safe only once they, or `StoreWriter.commit`, have counted it in
what they return.

The order is what makes a store survive: first the shard's data, then its page of the journal, each written whole. A
process killed in between leaves data that no page names; the next one writes over it. A shard that is committed before
it is full is written again, with what came in since; its earlier rows are the same bytes, so nothing is at risk.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.run import check_conditions
from difftap.engine import Features
from difftap.errors import InputError, OutputError
from difftap.features.store.encoding import Basis, EncodedMap, Encoding, Fidelity, StoredImage, shapes_of, store_image
from difftap.features.store.place import Place
from difftap.features.store.schema import (
    CONDITIONS,
    Failure,
    Provenance,
    ShardEntry,
    StoredRow,
    TapArray,
    pages,
    read_provenance,
    tap_arrays,
)

__all__ = ["Shard", "StoreWriter", "check_writable", "create_arrays", "finish", "open_writer", "shard_rows"]

# ---- one shard: rows gather in memory and go to disk together

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
    """Write a small array, whole."""
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
        page: ShardEntry | None = None,
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
            StoredRow(
                self.number * self._provenance.shard + place,
                key,
                image.features.digest,
                geometry.image,
                geometry.content,
                dict(image.sha256),
                fidelity,
            )
        )

    def copy(self, row: StoredRow, stored: Mapping[str, EncodedMap]) -> None:
        """Take a row of another store, or of another place in this one, as it is."""
        self._keep(stored)
        number = self.number * self._provenance.shard + len(self._rows)
        self._rows.append(StoredRow(**{**vars(row), "row": number}))

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

    def _keep(self, stored: Mapping[str, EncodedMap]) -> None:
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
            self._group["journal"][self.number] = ShardEntry(tuple(self._rows), tuple(self._failures)).text()
        self._safe += count
        return count


# ---- the end of a run: arrays for other readers are filled, what was reserved is cut off

_INDEX_ROWS = 4096  # a chunk of the arrays key, digest, image, content


def finish(group: Any, place: Place, provenance: Provenance) -> None:
    """Bring a store's other arrays in line with its journal, and mark it complete."""
    used, rows, fidelity = 0, 0, {}  # type: ignore[var-annotated]
    for number, page in enumerate(pages(group, place)):
        if page:
            used = number + 1
        for row in page.rows:
            rows = max(rows, row.row + 1)
            for name, one in row.fidelity.items():
                fidelity.setdefault(name, []).append(Fidelity(**one))  # type: ignore[arg-type]
    _write_index(group, place, rows)
    for array in tap_arrays(group, provenance, place):
        for part in (array.values, array.scale):
            if part is not None and part.shape[0] != rows:
                part.resize((rows, *part.shape[1:]))
    group["journal"].resize((used,))
    noted = dict(group.attrs)["difftap"]
    summary = {name: Fidelity.join(parts).to_dict() for name, parts in fidelity.items()}
    group.attrs.update({"difftap": {**noted, "fidelity": summary, "complete": True}})


def _write_index(group: Any, place: Place, rows: int) -> None:
    """Fill the arrays key, digest, image and content from the journal, a chunk at a time."""
    if not rows:
        return
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "key": ((), str), "digest": ((32,), "uint8"), "image": ((2,), "int32"), "content": ((4,), "float64"),
    }  # fmt: skip
    arrays = {
        name: group.create_array(
            name, shape=(rows, *shape), chunks=(_INDEX_ROWS, *shape), dtype=dtype, compressors=None, overwrite=True,
            fill_value="" if dtype is str else 0,
        )
        for name, (shape, dtype) in shapes.items()
    }  # fmt: skip
    waiting: list[StoredRow] = []

    def flush(start: int) -> None:
        stop = min(start + _INDEX_ROWS, rows)
        keys: Any = np.full(stop - start, "", object)
        tables = {name: np.zeros((stop - start, *shapes[name][0]), shapes[name][1]) for name in list(shapes)[1:]}
        for row in waiting:
            # A file name that is not UTF-8 has no place in a text array as it is.
            keys[row.row - start] = row.key.encode("utf-8", "backslashreplace").decode()
            tables["digest"][row.row - start] = np.frombuffer(bytes.fromhex(row.digest), np.uint8)
            tables["image"][row.row - start] = row.image
            tables["content"][row.row - start] = row.content
        arrays["key"][start:stop] = keys
        for name, table in tables.items():
            arrays[name][start:stop] = table
        waiting.clear()

    start = 0
    for page in pages(group, place):
        for row in page.rows:
            while row.row >= start + _INDEX_ROWS:
                flush(start)
                start += _INDEX_ROWS
            waiting.append(row)
    flush(start)


# ---- the store


@contextlib.contextmanager
def open_writer(
    path: str | Path,
    conditions: Mapping[str, Any],
    features: Mapping[str, Any],
    encoding: Encoding,
    *,
    shard: int,
    every: float = 30.0,
    overwrite: bool = False,
    runs: Sequence[Mapping[str, Any]] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StoreWriter]:
    """Begin a store, or take up one that was begun under the same conditions; alone, where it is a local folder.

    Args:
        path: a local folder, or an fsspec address.
        conditions: of the pipeline that fills it (`difftap.Pipeline.conditions`).
        features: the recipe's `difftap.Recipe.feature_fields`.
        encoding: how maps are stored.
        shard: rows a shard, of a new store.
        every: most seconds that finished records wait in memory for their shard to fill.
        overwrite: delete the store that is there.
        runs: conditions of earlier runs, where what they made is copied into a new store.
        clock: tells the time in seconds.

    Raises:
        OutputError: it cannot be written, holds something else, was begun under other conditions, or is being written.
    """
    place = Place(path)
    with place.locked():
        group = _existing(place, overwrite=overwrite)
        wanted = Provenance(dict(conditions), dict(features), encoding, shard)
        if group is None:
            group = place.create(
                {"difftap": {**wanted.to_dict(), "runs": [dict(one) for one in runs], "complete": False}}
            )
        else:
            wanted = _agreeing(read_provenance(group, place), wanted, place)
            place.sweep()
        writer = StoreWriter(group, place, wanted, every, clock)
        writer.begin(conditions)
        try:
            yield writer
        except OutputError:
            raise  # the disk is full or gone: there is no use in trying to write more
        except BaseException:
            with contextlib.suppress(OutputError):  # the first error is the one to tell
                writer.commit()
            raise


def check_writable(
    path: str | Path, features: Mapping[str, Any], encoding: Encoding, *, overwrite: bool = False
) -> None:
    """Make sure, before anything slow starts, that a store can be begun or taken up; writes nothing.

    Args:
        path, features, encoding, overwrite: as `open_writer` takes them.

    Raises:
        OutputError: as `open_writer` raises it, but for what only open engines can tell.
    """
    place = Place(path)
    with place.locked():
        group = _existing(place, overwrite=False)
        if group is not None and not overwrite:
            have = read_provenance(group, place)
            check_conditions(place, _asked(have.features, have.encoding), _asked(features, encoding), kind="store")


def _asked(features: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    recipe = {name: value for name, value in features.items() if name != "model"}
    return {"recipe": recipe, "encoding": encoding.to_dict()}


def _existing(place: Place, *, overwrite: bool) -> Any:
    """Return the store that is there, open for writing; None if one is to be made.

    Raises:
        OutputError: something else is there.
    """
    group = place.open(read_only=False)
    if group is None:
        if not place.empty():
            raise OutputError(f"'{place}' exists, is not empty and is no feature store; choose another place")
        return None
    try:
        read_provenance(group, place)
    except InputError as error:
        raise OutputError(f"{error}; nothing was written") from error
    if overwrite:
        place.remove()
        return None
    return group


def _agreeing(have: Provenance, want: Provenance, place: Place) -> Provenance:
    """Return the store's provenance, if the run's does not contradict it.

    Raises:
        OutputError: it does; names the first field that differs.
    """

    def fields(one: Provenance) -> dict[str, Any]:
        backend = one.conditions["backend"]
        return {
            **_asked(one.features, one.encoding),
            "model": one.model_key,
            "prompts": one.conditions.get("prompts"),
            **{f"backend {name}": backend.get(name) for name in CONDITIONS},
        }

    check_conditions(place, fields(have), fields(want), kind="store")
    return have


class StoreWriter:
    """An open store; use `open_writer`.

    Attributes:
        place: where it lies.
        provenance: what it holds.
        done: keys of images that are in.
        failed: reason by key of images that failed before.
        committed: records made safe by this run.
    """

    def __init__(
        self, group: Any, place: Place, provenance: Provenance, every: float, clock: Callable[[], float]
    ) -> None:
        self.group = group
        self.place = place
        self.provenance = provenance
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.committed = 0
        self._every = every
        self._clock = clock
        self._since = clock()
        self._pages = 0
        self._shard: Shard | None = None
        self._room: dict[str, NDArray[Any]] = {}
        self._taps: list[TapArray] = []

    def begin(self, conditions: Mapping[str, Any]) -> None:
        """Read the journal, note the run in the provenance, and find the place to go on."""
        with self.place.errors():
            if "journal" not in self.group:
                self.group.create_array(
                    "journal", shape=(0,), chunks=(1,), dtype=str, fill_value="", compressors=None,
                    dimension_names=("shard",),
                )  # fmt: skip
        last: ShardEntry | None = None
        for number, page in enumerate(pages(self.group, self.place)):
            if page:
                self._pages, last = number + 1, page
            self.done.update(row.key for row in page.rows)
            self.failed.update((failure.key, failure.error) for failure in page.failures)
        self.failed = {key: error for key, error in self.failed.items() if key not in self.done}
        noted = dict(self.group.attrs)["difftap"]
        plain = json.loads(json.dumps(conditions))
        if plain not in noted["runs"] or noted["complete"]:
            runs = noted["runs"] + ([] if plain in noted["runs"] else [plain])
            with self.place.errors():
                self.group.attrs.update({"difftap": {**noted, "runs": runs, "complete": False}})
        if last is not None and len(last.rows) < self.provenance.shard:
            self._pages -= 1
            self._open_shard(last)

    @property
    def next_shard(self) -> int:
        """Number of the first shard that nothing was written to."""
        return self._pages + (self._shard is not None)

    def reserve(self, shards: int) -> None:
        """Make room for so many shards after those in use, in few steps: each rewrites the arrays' descriptions."""
        count = self.next_shard + shards
        with self.place.errors():
            journal = self.group["journal"]
            if journal.shape[0] < count:
                journal.resize((count,))
            self._lengthen(count * self.provenance.shard)

    def _lengthen(self, rows: int) -> None:
        """Make the taps' arrays at least so long: a finished store's may end within a shard, and shards are whole."""
        for array in self._arrays():
            for one in (array.values, array.scale):
                if one is not None and one.shape[0] < rows:
                    one.resize((rows, *one.shape[1:]))

    def _arrays(self) -> list[TapArray]:
        """Return the taps' arrays; none unless all are there. Opening takes as long as an image, so it is done once."""
        if not self._taps and self._bound():
            self._taps = tap_arrays(self.group, self.provenance, self.place)
        return self._taps

    def _bound(self) -> bool:
        names = [f"{branch}/{tap}" for branch, taps in enumerate(self.provenance.branches) for tap in taps]
        parts = ("",) if self.provenance.encoding.dtype != "int8" else ("", ".scale")
        return all(f"{name}{part}" in self.group for name in names for part in parts)

    def prepare(self, shapes: Mapping[str, tuple[int, int, int]], bases: Mapping[str, Basis]) -> None:
        """Make the arrays that are not there yet.

        Args:
            shapes: ``(C, h, w)`` by array name (`difftap.features.store.encoding.shapes_of`).
            bases: of a store with PCA, by array name.
        """
        if not self._arrays():
            with self.place.errors():
                rows = max(self.group["journal"].shape[0], self.next_shard + 1) * self.provenance.shard
                create_arrays(self.group, self.provenance, shapes, bases, rows)
                self._lengthen(rows)  # some may have been made, for fewer images, by a run that was killed at it

    @property
    def ready(self) -> bool:
        """Whether every tap's array is there."""
        return bool(self._arrays())

    @property
    def bases(self) -> dict[str, Basis]:
        """The PCA bases of the store's arrays, by name; none before they are made."""
        return {array.name: array.basis for array in self._arrays() if array.basis is not None}

    def _open_shard(self, page: ShardEntry | None = None) -> Shard:
        number = self._pages
        if self.group["journal"].shape[0] <= number or self._too_short(number):
            self.reserve(max(1, number // 8))
        self._shard = Shard(self.group, self.place, self.provenance, self._arrays(), number, page, self._room)
        self._room = {}
        return self._shard

    def _too_short(self, number: int) -> bool:
        rows = (number + 1) * self.provenance.shard
        every = (one for array in self._arrays() for one in (array.values, array.scale))
        return any(one.shape[0] < rows for one in every if one is not None)

    def add(self, key: str, features: Features) -> int:
        """Encode and take an image's features; returns how many records became safe.

        What cannot be stored is recorded as a failure, and why.

        Raises:
            InputError: the maps have other shapes than the store's arrays.
            OutputError: the disk is full, or the like.
        """
        try:
            image = store_image(features, self.provenance.encoding, self.bases)
        except InputError as error:
            return self.fail(key, str(error))
        return self.put(key, image)

    def put(self, key: str, image: StoredImage) -> int:
        """Take an image's maps, encoded with the store's encoding and `bases`; as `add` otherwise."""
        shard = self._shard or self._open_shard()
        if not self._taps:
            self.prepare(shapes_of(image.features), {})
        shard.use(self._arrays())  # it may have been opened, by failures, before they were made
        shard.add(key, image)
        return self._after(shard)

    def copy(self, row: StoredRow, stored: Mapping[str, EncodedMap]) -> int:
        """Take a row of another store as it is; returns how many records became safe."""
        shard = self._shard or self._open_shard()
        shard.copy(row, stored)
        return self._after(shard)

    def fail(self, key: str, error: str) -> int:
        """Record that an image could not be used; returns how many records became safe."""
        shard = self._shard or self._open_shard()
        shard.fail(key, error)
        return self._after(shard)

    def _after(self, shard: Shard) -> int:
        if shard.full or self._clock() - self._since >= self._every:
            return self.commit()
        return 0

    def commit(self) -> int:
        """Put on disk what came in; returns how many records became safe."""
        self._since = self._clock()
        if self._shard is None:
            return 0
        count = self._shard.commit()
        self.committed += count
        if self._shard.full:
            self._room = self._shard.room
            self._shard = None
            self._pages += 1
        return count

    def finish(self) -> int:
        """Commit, fill the index arrays, cut what was reserved, and mark the store complete; returns as `commit`."""
        count = self.commit()
        with self.place.errors():
            finish(self.group, self.place, self.provenance)
        self._taps = []  # cut
        return count
