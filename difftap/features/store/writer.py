"""Writing a feature store: begun or taken up again, filled shard by shard, finished.

What `StoreWriter.put` and `StoreWriter.fail` take is safe only once they, or `StoreWriter.commit`, have counted it in
what they return.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from difftap.artifacts.run import check_conditions
from difftap.engine import Features
from difftap.errors import InputError, OutputError
from difftap.features.store.encoding import Basis, Encoding, Stored
from difftap.features.store.finish import finish
from difftap.features.store.image import StoredImage, shapes_of, store_image
from difftap.features.store.log import Page, Row
from difftap.features.store.place import Place
from difftap.features.store.schema import (
    CONDITIONS,
    Provenance,
    TapArray,
    pages,
    read_provenance,
    tap_arrays,
)
from difftap.features.store.shard import Shard, create_arrays

__all__ = ["StoreWriter", "check_writable", "open_writer"]


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
    """The store that is there, open for writing; None if one is to be made.

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
    """The store's provenance, if the run's does not contradict it.

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
        last: Page | None = None
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
        """The taps' arrays, opened once, for that takes as long as a fast engine's image; none unless all are there."""
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
            shapes: ``(C, h, w)`` by array name (`difftap.features.store.image.shapes_of`).
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

    def _open_shard(self, page: Page | None = None) -> Shard:
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

    def copy(self, row: Row, stored: Mapping[str, Stored]) -> int:
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
