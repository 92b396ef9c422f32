"""Where a store lies: a local folder or any fsspec address, opened with zarr; local writes are durable and locked.

This is the only module that touches zarr's stores. A local object is synced to the disk before it gets its name, so the
old one stays whole until the new one is safe. Elsewhere, an object appears whole when its upload ends, as object stores
promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import only_writer, output_errors
from difftap.errors import InputError, OutputError, first_line, require

if TYPE_CHECKING:
    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

__all__ = ["Place", "StoreArray", "StoreGroup"]


class StoreArray(Protocol):
    """The part of ``zarr.Array`` that is used here."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: MutableMapping[str, Any]

    def __getitem__(self, rows: int | slice, /) -> NDArray[Any]: ...
    def __setitem__(self, rows: int | slice, values: object, /) -> None: ...
    def resize(self, shape: tuple[int, ...]) -> None: ...  # noqa: D102
    def with_config(self, config: Mapping[str, bool]) -> StoreArray: ...  # noqa: D102


class StoreGroup(Protocol):
    """The part of ``zarr.Group`` that is used here. Ours hold arrays only, which zarr's own type does not tell."""

    attrs: MutableMapping[str, Any]

    def __contains__(self, name: str, /) -> bool: ...
    def __getitem__(self, name: str, /) -> StoreArray: ...
    def get(self, name: str, /) -> StoreArray | None: ...  # noqa: D102
    def create_array(self, name: str, **options: object) -> StoreArray: ...  # noqa: D102


class Place:
    """A store's address.

    Attributes:
        address: the address as the user gave it.
        folder: the local folder; None for an address of another kind.

    >>> Place("features.zarr").folder
    PosixPath('features.zarr')
    >>> Place("s3://bucket/features.zarr").folder is None
    True
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        text = self.address.removeprefix("file://")
        self.folder = None if "://" in text or "::" in text else Path(text)

    def __str__(self) -> str:
        return self.address

    def _store(self, *, read_only: bool) -> Store:
        zarr = require("zarr", "store", "a feature store")
        store: Store
        if self.folder is not None:
            store = zarr.storage.LocalStore(self.folder, read_only=True) if read_only else _durable(self.folder)
            return store
        require("fsspec", "store", f"'{self.address}'")
        try:
            store = zarr.storage.FsspecStore.from_url(self.address, read_only=read_only)
            return store
        except ImportError as error:
            raise InputError(f"'{self.address}' needs another package: {first_line(error)}") from error
        except (ValueError, OSError) as error:
            raise InputError(f"'{self.address}' cannot be opened: {first_line(error)}") from error

    def open(self, *, read_only: bool = True) -> StoreGroup | None:
        """Open the zarr group; None if there is none.

        Raises:
            InputError: the address is of an unknown kind, or cannot be reached.
            MissingExtraError: zarr is not installed.
        """
        zarr = require("zarr", "store", "a feature store")
        if read_only and self.folder is not None and not self.folder.exists() and self.beside("old").exists():
            with self.locked():  # locking restores the store; a writer holds the lock already
                pass
        if self.folder is not None and not self.folder.exists():
            return None  # here, because zarr would make the folder
        try:
            mode = "r" if read_only else "r+"
            group: StoreGroup = zarr.open_group(self._store(read_only=read_only), mode=mode, zarr_format=3)
            return group
        except (FileNotFoundError, zarr.errors.NodeNotFoundError, zarr.errors.ContainsArrayError):
            return None
        except InputError:
            raise
        except Exception as error:  # each file system has its own errors, and zarr has many for damaged metadata
            raise InputError(
                f"'{self}' cannot be opened as a feature store ({type(error).__name__}: {first_line(error)})"
            ) from error

    def create(self, attributes: dict[str, object]) -> StoreGroup:
        """Make a new, empty zarr group.

        Raises:
            OutputError: it cannot be made.
        """
        zarr = require("zarr", "store", "a feature store")
        with self.errors():
            group: StoreGroup = zarr.create_group(self._store(read_only=False), zarr_format=3, attributes=attributes)
            return group

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an error of the file system while we write into one clear line.

        Raises:
            OutputError: replaces any such error of the body.
        """
        try:
            with output_errors(Path(self.address)):
                yield
        except (OutputError, InputError):
            raise
        except Exception as error:
            if self.folder is not None:  # no OSError, so not the file system's: a fault of ours
                raise
            raise OutputError(f"cannot write '{self}': {type(error).__name__}: {first_line(error)}") from error

    def empty(self) -> bool:
        """Tell whether the place is empty."""
        if self.folder is not None:
            with self.errors():
                return not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        system, path = require("fsspec", "store", f"'{self}'").core.url_to_fs(self.address)
        return not system.exists(path) or not system.find(path)

    def remove(self) -> None:
        """Delete everything at this place."""
        with self.errors():
            if self.folder is not None:
                self.discard(self.folder.resolve())
                return
            system, path = require("fsspec", "store", f"'{self}'").core.url_to_fs(self.address)
            system.rm(path, recursive=True)

    def beside(self, word: str) -> Path:
        """Give the path of a hidden file or folder beside a local store: ``.name.word``."""
        folder = Path(self.address.removeprefix("file://")).resolve()
        return folder.with_name(f".{folder.name}.{word}")

    def discard(self, folder: Path) -> None:
        """Delete a local store's folder, or one beside it.

        It is renamed first, so that a deletion that is killed leaves nothing that looks like a store.
        """
        gone = self.beside("gone")
        if gone.exists():
            shutil.rmtree(gone)
        if folder.exists():
            folder.rename(gone)
            shutil.rmtree(gone)

    def restore(self) -> None:
        """Restore a store whose compaction was killed between its two renames. The caller must hold the lock."""
        if self.folder is not None and not self.folder.exists() and self.beside("old").exists():
            self.beside("old").rename(self.folder.resolve())

    def sweep(self) -> None:
        """Delete the scratch files of a killed writer. The caller must hold the lock."""
        if self.folder is not None:
            for scratch in self.folder.rglob("*.partial"):
                scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock a local store for this process. Stores elsewhere have no lock.

        Raises:
            OutputError: another process holds the lock, or the folder around the store does not exist.
        """
        if self.folder is None:
            yield
            return
        with self.errors():
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(errno.EEXIST, "a file stands there; give the name of a folder")
        folder = self.folder.resolve()  # follows links, so that all names of a store have one lock
        with only_writer(self.folder, folder.with_name(f".{folder.name}.lock")):
            with self.errors():
                self.restore()
            yield


def put(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file. When this returns, it is on the disk under its name; a failure leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(scratch, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    if os.name != "nt":  # the name is in the folder, which must be synced too; Windows cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _durable(folder: Path) -> Store:
    """Open a zarr store of local files that syncs every object before it gets its name."""
    from zarr.storage import LocalStore

    class DurableStore(LocalStore):
        async def set(self, key: str, value: Buffer) -> None:
            if not self._is_open:
                await self._open()
            await asyncio.to_thread(put, self.root / key, value.as_buffer_like())

        async def set_if_not_exists(self, key: str, value: Buffer) -> None:
            if not await self.exists(key):
                await self.set(key, value)

    return DurableStore(folder)
