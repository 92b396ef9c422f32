"""Look after a store: tell what is in it, check that it is whole, and make it compact."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftap.artifacts.files import JsonObject
from difftap.errors import ArtifactError, InputError, OutputError, first_line, require
from difftap.features.store.encoding import EncodedMap, Fidelity, row_digest
from difftap.features.store.place import Place
from difftap.features.store.reader import FeatureStore
from difftap.features.store.schema import StoredRow, TapArray
from difftap.features.store.writer import open_writer

__all__ = ["Compacted", "StoreProblem", "compact", "info", "verify"]


def info(store: FeatureStore) -> JsonObject:
    """Describe a store as plain data: provenance, counts, size in bytes, fidelity."""
    noted = store.noted
    measured: dict[str, list[Fidelity]] = {}
    for row in store.rows:
        for name, one in row.fidelity.items():
            measured.setdefault(name, []).append(Fidelity(**one))  # type: ignore[arg-type]
    provenance = store.provenance
    arrays = {
        array.name: {
            "shape": [len(store), *array.values.shape[1:]],
            "dtype": str(array.values.dtype),
            "channels": array.values.shape[1] if array.basis is None else len(array.basis.mean),
            **({} if array.basis is None else {"pca_share": array.basis.share}),
        }
        for array in store.taps
    }
    return {
        "store": str(store.place),
        "schema": noted["schema"],
        "complete": bool(noted.get("complete")),
        "images": len(store),
        "failed": len(store.failures),
        "holes": store.holes,
        "bytes": _bytes(store.place),
        "shard": provenance.shard,
        "encoding": provenance.encoding.to_dict(),
        "arrays": arrays,
        "fidelity": {name: Fidelity.join(parts).to_dict() for name, parts in measured.items()},
        "recipe": dict(provenance.features),
        "model": provenance.conditions["model"],
        "backend": provenance.conditions["backend"],
        "difftap": provenance.conditions.get("difftap"),
        "runs": noted["runs"],
    }


def _bytes(place: Place) -> int:
    if place.folder is not None:
        return sum(file.stat().st_size for file in place.folder.rglob("*") if file.is_file())
    system, path = require("fsspec", "store", f"'{place}'").core.url_to_fs(place.address)
    return int(system.du(path))


@dataclass(frozen=True)
class StoreProblem:
    """Something that is wrong with a store.

    Attributes:
        key: the image concerned; empty if it is not about one image.
        message: what is wrong.
    """

    key: str
    message: str


def verify(store: FeatureStore, progress: Callable[[int], None] = lambda count: None) -> Iterator[StoreProblem]:
    """Read the whole store and compare it with its journal: shapes, digests, finite values, keys.

    Args:
        store: the store.
        progress: called with the number of images checked since the last call.
    """
    yield from _check_arrays(store)
    seen: dict[str, int] = {}
    for row in store.rows:
        if seen.setdefault(row.key, row.row) != row.row:
            yield StoreProblem(row.key, f"is in twice, in rows {seen[row.key]} and {row.row}")
    for key, message in _damaged(store, progress):
        yield StoreProblem(key, message)
    if store.noted.get("complete"):
        yield from _check_index(store)


def _check_arrays(store: FeatureStore) -> Iterator[StoreProblem]:
    rows = max((row.row + 1 for row in store.rows), default=0)
    for array in store.taps:
        for name, one in ((array.name, array.values), (f"{array.name}.scale", array.scale)):
            if one is not None and one.shape[0] < rows:
                yield StoreProblem("", f"array '{name}' has {one.shape[0]} rows; the journal speaks of {rows}")
        for part in () if array.basis is None else (array.basis.mean, array.basis.components):
            if not np.isfinite(part).all():
                yield StoreProblem("", f"the basis of '{array.name}' holds values that are not finite")


def _damaged(store: FeatureStore, progress: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    """Yield key and reason of each row whose data differ from the journal."""
    for row in store.rows:
        for array in store.taps:
            message = _fault(store, array, row)
            if message:
                yield row.key, message
                break
        progress(1)


def _fault(store: FeatureStore, array: TapArray, row: StoredRow) -> str:
    if row.row >= array.values.shape[0]:
        return f"row {row.row} of '{array.name}' is missing"
    try:
        stored = store.stored(array, row.row)
    except ArtifactError as error:
        return str(error)
    if row_digest(stored) != row.sha256.get(array.name):
        return f"row {row.row} of '{array.name}' is not what was written (SHA-256 differs)"
    if not np.isfinite(stored.values).all() or (stored.scale is not None and not np.isfinite(stored.scale).all()):
        return f"row {row.row} of '{array.name}' holds values that are not finite"
    return ""


def _check_index(store: FeatureStore) -> Iterator[StoreProblem]:
    """Check that the arrays for other programs agree with the journal; difftap itself reads only the journal."""
    if not store.rows:
        return
    try:
        keys, digests = store.group["key"][:], store.group["digest"][:]
    except Exception as error:  # zarr and its codecs raise errors of many kinds
        yield StoreProblem("", f"the arrays 'key' and 'digest' cannot be read ({first_line(error)})")
        return
    for row in store.rows:
        key = row.key.encode("utf-8", "backslashreplace").decode()
        if row.row >= len(keys) or keys[row.row] != key or digests[row.row].tobytes().hex() != row.digest:
            yield StoreProblem(
                row.key, f"row {row.row} of the arrays 'key' and 'digest' does not agree with the journal"
            )


@dataclass(frozen=True)
class Compacted:
    """The result of `compact`.

    Attributes:
        kept: images in the new store.
        damaged: images that were left out because their data are damaged.
        forgotten: failures that were not copied.
        before: bytes of the old store.
        after: bytes of the new store.
    """

    kept: int
    damaged: int
    forgotten: int
    before: int
    after: int


def compact(
    path: str | Path,
    output: str | Path | None = None,
    *,
    shard: int | None = None,
    drop_damaged: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Compacted:
    """Copy a store without holes, reserved rows and failures.

    A later extraction tries the failed images again.

    Args:
        path: the store.
        output: the new store; None to replace a local store.
        shard: rows per shard; None for as many as before.
        drop_damaged: leave out images whose data are damaged; a later extraction makes them again.
        progress: called with the number of images copied since the last call.

    Raises:
        ArtifactError: an image's data are damaged, and ``drop_damaged`` is not set.
        InputError: a store that is not local would have to be replaced.
        OutputError: the new store cannot be written; the old one stays as it was.
    """
    place = Place(path)
    if output is not None:
        _vacant(Place(output))
        return _copy(FeatureStore.open(path), str(output), shard, drop_damaged, progress)
    if place.folder is None:
        raise InputError(f"'{place}' is no local folder and cannot be replaced in one step; give -o NEW")
    folder, scratch, old = place.folder.resolve(), place.beside("compact"), place.beside("old")
    with place.locked():  # locking has restored a store whose compaction was killed between the two renames below
        with place.errors():
            for left in (scratch, old):
                place.discard(left)
        try:
            done = _copy(FeatureStore.open(path), str(scratch), shard, drop_damaged, progress)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(scratch)
            raise
        with place.errors():
            os.replace(folder, old)  # two renames, because no system replaces a folder that is not empty
            os.replace(scratch, folder)
            place.discard(old)
    return done


def _vacant(place: Place) -> None:
    if not place.empty():
        raise OutputError(f"'{place}' exists and is not empty; choose another place")


def _copy(
    store: FeatureStore, target: str, shard: int | None, drop_damaged: bool, progress: Callable[[int], None]
) -> Compacted:
    """Write the rows of a store into a new one, in order."""
    provenance, taps = store.provenance, store.taps
    kept = damaged = 0
    with open_writer(
        target,
        provenance.conditions,
        provenance.features,
        provenance.encoding,
        shard=shard or provenance.shard,
        runs=store.noted["runs"],
    ) as writer:
        writer.reserve(-(-len(store) // writer.provenance.shard))
        if taps:
            shapes = {array.name: _shape(array) for array in taps}
            writer.prepare(shapes, {array.name: array.basis for array in taps if array.basis is not None})
        for row in store.rows:
            stored = _whole(store, taps, row)
            if isinstance(stored, str):
                if not drop_damaged:
                    raise ArtifactError(f"'{row.key}': {stored}; --drop-damaged leaves such images out")
                damaged += 1
            else:
                writer.copy(row, stored)
                kept += 1
            progress(1)
        writer.finish()
    before, after = _bytes(store.place), _bytes(Place(target))
    return Compacted(kept, damaged, len(store.failures), before, after)


def _shape(array: TapArray) -> tuple[int, int, int]:
    components, height, width = array.values.shape[1:]
    return int(components), int(height), int(width)


def _whole(store: FeatureStore, taps: Sequence[TapArray], row: StoredRow) -> dict[str, EncodedMap] | str:
    """Read what is stored of a row, by array name; if it is damaged, give the reason instead."""
    faults = (_fault(store, array, row) for array in taps)
    fault = next(itertools.dropwhile(lambda text: not text, faults), "")
    return fault or {array.name: store.stored(array, row.row) for array in taps}
