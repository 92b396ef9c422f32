"""Write a feature store: begin it or continue it, fill it shard by shard, and finish it.

`StoreWriter` keeps records in memory until their shard is written. Its methods return how many records became safe on
disk; a record is safe only when it has been counted so.

The order of writing keeps a store whole: first a shard's data, then its page of the journal. A process that is killed
in between leaves data that no page names, and the next one writes over them. A shard that is written before it is full
is written again later; its earlier rows get the same bytes, so they are never at risk.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import check_conditions
from difftap.engine import Features
from difftap.errors import InputError, OutputError
from difftap.features.store.encoding import Basis, EncodedMap, Encoding, Fidelity, StoredImage, shapes_of, store_image
from difftap.features.store.place import Place, StoreGroup
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

SHARD_BYTES = 64 << 20  # a shard is one file, held in memory while it fills
CHUNK_BYTES = 256 << 10  # a reader of one image reads whole chunks
MOST_ROWS = 256  # rows of a shard; a page of the journal has as many lines


def shard_rows(row_bytes: int) -> int:
    """Give the rows of a shard: the largest power of two that fits in 64 MiB, at most 256.

    >>> shard_rows(1280 * 48 * 48 * 2)
    8
    """
    return 1 << (max(1, min(MOST_ROWS, SHARD_BYTES // max(1, row_bytes))).bit_length() - 1)


def _chunk_rows(row_bytes: int, shard: int) -> int:
    """Give the rows of a chunk, a divisor of the shard: one of large maps, several of small ones.

    Small chunks would cost more time for their handling than for their bytes.
    """
    wanted = max(1, min(shard, CHUNK_BYTES // max(1, row_bytes)))
    return max(rows for rows in range(1, wanted + 1) if shard % rows == 0)


def create_arrays(
    group: StoreGroup,
    provenance: Provenance,
    shapes: Mapping[str, tuple[int, int, int]],
    bases: Mapping[str, Basis],
    rows: int,
) -> None:
    """Make the arrays of the taps that do not exist yet.

    Args:
        group: the store's zarr group.
        provenance: what the store holds.
        shapes: ``(C, h, w)`` by array name.
        bases: the PCA bases by array name; empty without PCA.
        rows: length of the first axis; a multiple of the shard.
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
    group: StoreGroup, name: str, shape: tuple[int, ...], dtype: str, shard: int, chunk: int, axes: tuple[str, ...]
) -> None:
    if name not in group:
        group.create_array(
            name,
            shape=shape,
            shards=(shard, *shape[1:]),
            chunks=(chunk, *shape[1:]),
            dtype=dtype,
            compressors=None,  # features look like noise: compressing saves a tenth at best and takes most of the time
            fill_value=0,
            dimension_names=axes,
        )


def _put(
    group: StoreGroup, name: str, data: NDArray[np.float32], attributes: Mapping[str, float] | None = None
) -> None:
    """Write a small array; replace it if it exists."""
    group.create_array(name, data=data, compressors=None, attributes=dict(attributes or {}), overwrite=True)


class Shard:
    """The rows of one shard, gathered in memory.

    Args:
        group: the store's zarr group, open for writing.
        place: the store's address.
        provenance: what the store holds.
        arrays: the arrays of its taps; their first axis must reach to the shard's end.
        number: the shard's number.
        page: what an earlier run wrote of this shard.
        room: arrays in which an earlier shard of this run gathered its rows, to use again. The first touch of new
            memory takes longer than everything else that is done to a row.
    """

    def __init__(
        self,
        group: StoreGroup,
        place: Place,
        provenance: Provenance,
        arrays: Sequence[TapArray],
        number: int,
        page: ShardEntry | None = None,
        room: Mapping[str, NDArray[np.number]] | None = None,
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
        self._values: dict[str, NDArray[np.number]] = {}
        self._scales: dict[str, NDArray[np.number]] = {}

    @property
    def full(self) -> bool:
        """Whether no row is left."""
        return len(self._rows) >= self._provenance.shard

    @property
    def pending(self) -> int:
        """The number of records that are not on disk yet."""
        return len(self._rows) + len(self._failures) - self._safe

    def use(self, arrays: Sequence[TapArray]) -> None:
        """Set the arrays; they are made when the first features are known, which may be after this shard was begun."""
        self._arrays = list(arrays)

    def add(self, key: str, image: StoredImage) -> None:
        """Add an image's maps as the next row.

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
            if place == 0:  # only the first row of each shard is measured, because measuring takes time
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
        """Add a row that was read from a store, with its encoded maps; only its number changes."""
        self._keep(stored)
        number = self.number * self._provenance.shard + len(self._rows)
        self._rows.append(StoredRow(**{**vars(row), "row": number}))

    def fail(self, key: str, error: str) -> None:
        """Record that an image could not be used."""
        self._failures.append(Failure(key, " ".join(error.split())))

    def _buffer(self, array: TapArray) -> None:
        """Give the array memory for the whole shard, and read back the rows that an earlier run wrote."""
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
    def room(self) -> dict[str, NDArray[np.number]]:
        """The arrays that the rows are gathered in, which the next shard may use once this one is on disk."""
        return {**self._values, **{f"{name}.scale": scale for name, scale in self._scales.items()}}

    def commit(self) -> int:
        """Write everything to disk; return how many records became safe.

        Raises:
            OutputError: it cannot be written. Records that were safe stay safe.
        """
        count = self.pending
        if not count:
            return 0
        start = self.number * self._provenance.shard
        stop = start + self._provenance.shard
        for kept in (*self._values.values(), *self._scales.values()):
            kept[len(self._rows) :] = 0  # the memory may hold rows of an earlier shard
        with self._place.errors():
            for array in self._arrays:
                if array.name in self._values:  # missing if there are only failures
                    values = array.values
                    if self.full:  # none is empty, so zarr need not compare every chunk with the fill value
                        values = values.with_config({"write_empty_chunks": True})
                    values[start:stop] = self._values[array.name]
                if array.name in self._scales and array.scale is not None:
                    array.scale[start:stop] = self._scales[array.name]
            # Last: the page makes the rows count, so their data must be on disk before it.
            self._group["journal"][self.number] = ShardEntry(tuple(self._rows), tuple(self._failures)).text()
        self._safe += count
        return count


# ---- the end of a run: arrays for other programs are filled, reserved rows are cut off

_INDEX_ROWS = 4096  # rows of a chunk of the arrays key, digest, image, content


def finish(group: StoreGroup, place: Place, provenance: Provenance) -> None:
    """Fill a store's arrays for other programs from its journal, cut off reserved rows, and mark it complete."""
    used = rows = 0
    fidelity: dict[str, list[Fidelity]] = {}
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


def _write_index(group: StoreGroup, place: Place, rows: int) -> None:
    """Fill the arrays key, digest, image and content from the journal, a chunk at a time."""
    if not rows:
        return
    shapes: dict[str, tuple[tuple[int, ...], type | str]] = {
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
        keys = np.full(stop - start, "", object)
        tables = {name: np.zeros((stop - start, *shapes[name][0]), shapes[name][1]) for name in list(shapes)[1:]}
        for row in waiting:
            # A file name that is not UTF-8 cannot be written to a text array unchanged.
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
    conditions: JsonObject,
    features: JsonObject,
    encoding: Encoding,
    *,
    shard: int,
    every: float = 30.0,
    overwrite: bool = False,
    runs: Sequence[JsonObject] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StoreWriter]:
    """Begin a store, or continue one that was begun under the same conditions. A local store is locked.

    Args:
        path: a local folder, or an fsspec address.
        conditions: the conditions of the pipeline that fills it (`difftap.Pipeline.conditions`).
        features: the recipe's `difftap.Recipe.feature_fields`.
        encoding: how maps are stored.
        shard: rows per shard of a new store.
        every: finished records wait in memory for at most this many seconds.
        overwrite: delete a store that is there.
        runs: conditions of the earlier runs whose rows are copied into a new store.
        clock: gives the time in seconds.

    Raises:
        OutputError: the store cannot be written, was begun under other conditions, is being written by another process,
            or the place holds something else.
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
            raise  # the disk is full or gone, so nothing more can be written
        except BaseException:
            with contextlib.suppress(OutputError):  # the first error is the one to report
                writer.commit()
            raise


def check_writable(path: str | Path, features: JsonObject, encoding: Encoding, *, overwrite: bool = False) -> None:
    """Check, before any slow work, that a store can be begun or continued; write nothing.

    Args:
        path: as for `open_writer`.
        features: as for `open_writer`.
        encoding: as for `open_writer`.
        overwrite: as for `open_writer`.

    Raises:
        OutputError: as for `open_writer`; but model, backend and prompts are not compared, because that needs engines.
    """
    place = Place(path)
    with place.locked():
        group = _existing(place, overwrite=False)
        if group is not None and not overwrite:
            have = read_provenance(group, place)
            check_conditions(place, _asked(have.features, have.encoding), _asked(features, encoding), kind="store")


def _asked(features: JsonObject, encoding: Encoding) -> dict[str, object]:
    recipe = {name: value for name, value in features.items() if name != "model"}
    return {"recipe": recipe, "encoding": encoding.to_dict()}


def _existing(place: Place, *, overwrite: bool) -> StoreGroup | None:
    """Open the store that is there for writing; return None if a new one must be made.

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
    """Return the store's provenance if a run with the provenance ``want`` may continue it.

    Raises:
        OutputError: it may not; the message names the first field that differs.
    """

    def fields(one: Provenance) -> dict[str, object]:
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
    """A store that is open for writing; `open_writer` makes it.

    Attributes:
        place: its address.
        provenance: what it holds.
        done: keys of the images that it held when it was opened.
        failed: key -> reason of the images that failed in earlier runs.
        committed: number of records that this run has made safe.
    """

    def __init__(
        self, group: StoreGroup, place: Place, provenance: Provenance, every: float, clock: Callable[[], float]
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
        self._room: dict[str, NDArray[np.number]] = {}
        self._taps: list[TapArray] = []

    def begin(self, conditions: JsonObject) -> None:
        """Read the journal, add the run to the provenance, and find the shard to continue with."""
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
        plain = json.loads(json.dumps(conditions))  # as the noted runs came through JSON: tuples became lists
        if plain not in noted["runs"] or noted["complete"]:
            runs = noted["runs"] + ([] if plain in noted["runs"] else [plain])
            with self.place.errors():
                self.group.attrs.update({"difftap": {**noted, "runs": runs, "complete": False}})
        if last is not None and len(last.rows) < self.provenance.shard:
            self._pages -= 1
            self._open_shard(last)

    @property
    def next_shard(self) -> int:
        """The number of the first shard that nothing was written to."""
        return self._pages + (self._shard is not None)

    def reserve(self, shards: int) -> None:
        """Lengthen the arrays by this many shards at once, because each step rewrites the arrays' descriptions."""
        count = self.next_shard + shards
        with self.place.errors():
            journal = self.group["journal"]
            if journal.shape[0] < count:
                journal.resize((count,))
            self._lengthen(count * self.provenance.shard)

    def _lengthen(self, rows: int) -> None:
        """Make the taps' arrays at least this long. Those of a finished store may end within a shard."""
        for array in self._arrays():
            for one in (array.values, array.scale):
                if one is not None and one.shape[0] < rows:
                    one.resize((rows, *one.shape[1:]))

    def _arrays(self) -> list[TapArray]:
        """Open the taps' arrays, once, since it takes as long as an image; none unless all of them exist."""
        if not self._taps and self._bound():
            self._taps = tap_arrays(self.group, self.provenance, self.place)
        return self._taps

    def _bound(self) -> bool:
        names = [f"{branch}/{tap}" for branch, taps in enumerate(self.provenance.branches) for tap in taps]
        parts = ("",) if self.provenance.encoding.dtype != "int8" else ("", ".scale")
        return all(f"{name}{part}" in self.group for name in names for part in parts)

    def prepare(self, shapes: Mapping[str, tuple[int, int, int]], bases: Mapping[str, Basis]) -> None:
        """Make the arrays that do not exist yet.

        Args:
            shapes: ``(C, h, w)`` by array name (`difftap.features.store.encoding.shapes_of`).
            bases: the PCA bases by array name; empty without PCA.
        """
        if not self._arrays():
            with self.place.errors():
                rows = max(self.group["journal"].shape[0], self.next_shard + 1) * self.provenance.shard
                create_arrays(self.group, self.provenance, shapes, bases, rows)
                self._lengthen(rows)  # a run that was killed here may have made some of them, for fewer images

    @property
    def ready(self) -> bool:
        """Whether every tap's array exists."""
        return bool(self._arrays())

    @property
    def bases(self) -> dict[str, Basis]:
        """The PCA bases by array name; empty before the arrays are made."""
        return {array.name: array.basis for array in self._arrays() if array.basis is not None}

    def _open_shard(self, page: ShardEntry | None = None) -> Shard:
        number = self._pages
        if self.group["journal"].shape[0] <= number or self._too_short(number):
            self.reserve(max(1, number // 8))  # grows by an eighth: few steps, and little to cut off at the end
        self._shard = Shard(self.group, self.place, self.provenance, self._arrays(), number, page, self._room)
        self._room = {}
        return self._shard

    def _too_short(self, number: int) -> bool:
        rows = (number + 1) * self.provenance.shard
        every = (one for array in self._arrays() for one in (array.values, array.scale))
        return any(one.shape[0] < rows for one in every if one is not None)

    def add(self, key: str, features: Features) -> int:
        """Encode and add an image's features; return how many records became safe.

        Features that cannot be encoded are recorded as a failure.

        Raises:
            InputError: the maps have other shapes than the store's arrays.
            OutputError: the store cannot be written.
        """
        try:
            image = store_image(features, self.provenance.encoding, self.bases)
        except InputError as error:
            return self.fail(key, str(error))
        return self.put(key, image)

    def put(self, key: str, image: StoredImage) -> int:
        """Add an image whose maps are encoded with the store's encoding and `bases`; otherwise like `add`."""
        shard = self._shard or self._open_shard()
        if not self._taps:
            self.prepare(shapes_of(image.features), {})
        shard.use(self._arrays())  # a failure may have begun the shard before the arrays were made
        shard.add(key, image)
        return self._after(shard)

    def copy(self, row: StoredRow, stored: Mapping[str, EncodedMap]) -> int:
        """Add a row of another store unchanged; return how many records became safe."""
        shard = self._shard or self._open_shard()
        shard.copy(row, stored)
        return self._after(shard)

    def fail(self, key: str, error: str) -> int:
        """Record that an image could not be used; return how many records became safe."""
        shard = self._shard or self._open_shard()
        shard.fail(key, error)
        return self._after(shard)

    def _after(self, shard: Shard) -> int:
        if shard.full or self._clock() - self._since >= self._every:
            return self.commit()
        return 0

    def commit(self) -> int:
        """Write everything in memory to disk; return how many records became safe."""
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
        """Commit and mark the store complete (`finish`); return how many records became safe."""
        count = self.commit()
        with self.place.errors():
            finish(self.group, self.place, self.provenance)
        self._taps = []  # opened again if needed, because their length has changed
        return count
