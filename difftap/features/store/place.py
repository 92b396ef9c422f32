"""Where a store lies: a local folder or any fsspec address, opened with zarr; local writes are durable, and locked.

The only module that touches zarr's stores. Locally an object is synced before it gets its name, so that what was there
before it stays whole until the new one is on the disk. Elsewhere an object appears whole when its upload ends, which is
what object stores promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difftap.artifacts.files import only_writer, output_errors
from difftap.errors import InputError, OutputError, first_line, require

__all__ = ["Place"]


class Place:
    """A store's address.

    Attributes:
        address: as it was given.
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

    def _store(self, *, read_only: bool) -> Any:
        zarr = require("zarr", "store", "a feature store")
        if self.folder is not None:
            return zarr.storage.LocalStore(self.folder, read_only=True) if read_only else _durable(self.folder)
        require("fsspec", "store", f"'{self.address}'")
        try:
            return zarr.storage.FsspecStore.from_url(self.address, read_only=read_only)
        except ImportError as error:
            raise InputError(f"'{self.address}' needs a package of its own: {first_line(error)}") from error
        except (ValueError, OSError) as error:
            raise InputError(f"'{self.address}' cannot be opened: {first_line(error)}") from error

    def open(self, *, read_only: bool = True) -> Any:
        """Open the zarr group that is there; None if there is none.

        Raises:
            InputError: the address is of no known kind, or cannot be reached.
            MissingExtraError: zarr is not installed.
        """
        zarr = require("zarr", "store", "a feature store")
        if read_only and self.folder is not None and not self.folder.exists() and self.beside("old").exists():
            with self.locked():  # which restores it; a writer has done so already
                pass
        if self.folder is not None and not self.folder.exists():
            return None  # zarr would make the folder
        try:
            return zarr.open_group(self._store(read_only=read_only), mode="r" if read_only else "r+", zarr_format=3)
        except (FileNotFoundError, zarr.errors.NodeNotFoundError, zarr.errors.ContainsArrayError):
            return None
        except InputError:
            raise
        except Exception as error:  # a file system's own kinds; and zarr's, of metadata it cannot read
            raise InputError(
                f"'{self}' cannot be opened as a feature store ({type(error).__name__}: {first_line(error)})"
            ) from error

    def create(self, attributes: dict[str, Any]) -> Any:
        """Make a new, empty zarr group.

        Raises:
            OutputError: it cannot be made.
        """
        zarr = require("zarr", "store", "a feature store")
        with self.errors():
            return zarr.create_group(self._store(read_only=False), zarr_format=3, attributes=attributes)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what a file system says while we write into one clear line.

        Raises:
            OutputError: in place of any other error of the system.
        """
        try:
            with output_errors(Path(self.address)):
                yield
        except (OutputError, InputError):
            raise
        except Exception as error:
            if self.folder is not None:
                raise
            raise OutputError(f"cannot write '{self}': {type(error).__name__}: {first_line(error)}") from error

    def empty(self) -> bool:
        """Whether nothing is there yet."""
        if self.folder is not None:
            with self.errors():
                return not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        system, path = require("fsspec", "store", f"'{self}'").core.url_to_fs(self.address)
        return not system.exists(path) or not system.find(path)

    def remove(self) -> None:
        """Delete all that is there."""
        with self.errors():
            if self.folder is not None:
                self.discard(self.folder.resolve())
                return
            system, path = require("fsspec", "store", f"'{self}'").core.url_to_fs(self.address)
            system.rm(path, recursive=True)

    def beside(self, word: str) -> Path:
        """Name a hidden neighbour of a local store, ``.name.word``."""
        folder = Path(self.address.removeprefix("file://")).resolve()
        return folder.with_name(f".{folder.name}.{word}")

    def discard(self, folder: Path) -> None:
        """Delete a local store's folder, or one beside it; killed midway, it leaves nothing that looks like a store."""
        gone = self.beside("gone")
        if gone.exists():
            shutil.rmtree(gone)
        if folder.exists():
            folder.rename(gone)
            shutil.rmtree(gone)

    def restore(self) -> None:
        """Put a store back whose compaction was killed after the old one had lost its name, before the new one had it.

        Only who holds the lock may do so.
        """
        if self.folder is not None and not self.folder.exists() and self.beside("old").exists():
            self.beside("old").rename(self.folder.resolve())

    def sweep(self) -> None:
        """Delete what a killed writer left half-written beside its objects; only a store's one writer may do so."""
        if self.folder is not None:
            for scratch in self.folder.rglob("*.partial"):
                scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a local store for this process alone. Stores elsewhere have no lock.

        Raises:
            OutputError: another process holds it, or the folder that it is to lie in does not exist.
        """
        if self.folder is None:
            yield
            return
        with self.errors():
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(errno.EEXIST, "a file stands there; give the name of a folder")
        folder = self.folder.resolve()  # through a link, so that both names of a store have one lock
        with only_writer(self.folder, folder.with_name(f".{folder.name}.lock")):
            with self.errors():
                self.restore()
            yield


def put(path: Path, data: Any) -> None:
    """Write a whole file: it is on the disk, under its name, when this returns; a failure leaves the old one."""
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
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _durable(folder: Path) -> Any:
    """Open a zarr store of local files, with every object synced before it appears."""
    from zarr.storage import LocalStore

    class DurableStore(LocalStore):
        async def set(self, key: str, value: Any) -> None:
            if not self._is_open:
                await self._open()
            await asyncio.to_thread(put, self.root / key, value.as_buffer_like())

        async def set_if_not_exists(self, key: str, value: Any) -> None:
            if not await self.exists(key):
                await self.set(key, value)

    return DurableStore(folder)
