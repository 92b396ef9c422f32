"""Writing files that last: a file is whole or absent, has one writer at a time, and a failure is one clear line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from difftap.errors import OutputError

__all__ = ["JsonObject", "atomic_path", "no_folder", "only_writer", "output_errors", "remove", "sweep", "write_atomic"]

JsonObject = dict[str, Any]
"""A JSON object whose values nobody has checked: as read from a file. Functions that only write take ``object``."""


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's error about a path that we write to into one clear line.

    Raises:
        OutputError: replaces any other OSError of the body.
    """
    try:
        yield
    except OutputError:  # is an OSError too, and already says what is wrong
        raise
    except OSError as error:
        hint = {
            errno.ENOSPC: "the disk is full; free some space or choose another place",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
            errno.EROFS: "the file system is read-only; choose another place",
            errno.EACCES: "permission denied; choose a place you may write to",
            errno.EPERM: "permission denied; choose a place you may write to",
            errno.ENOENT: "its folder does not exist; make it first",
            errno.ENOTDIR: "part of its path is a file; choose another place",
            errno.EISDIR: "a folder stands there; give the name of a file",
        }.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot write '{path}': {hint}") from error


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; do nothing where nothing stands."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``. On success it is renamed to ``path``, on failure it is removed.

    The body may write a file or a folder. A file is replaced in one step. An old folder is removed before the new one
    is renamed, so a reader may find none: folders need a manifest, or readers that wait.

    Raises:
        OutputError: the path cannot be written, or the result cannot be renamed.
    """
    # Beside the path, because a rename is one step only within a file system. Process and random number keep apart
    # writers in other processes and threads.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with output_errors(path):
            yield scratch
            if scratch.is_dir():
                remove(path)  # no system renames a folder onto a folder with files in it
            elif os.name != "nt":  # Windows syncs only files that are open for writing
                # Without it, a power cut after the rename could leave the right name on an empty file.
                with open(scratch, "rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            remove(scratch)


def sweep(path: Path) -> None:
    """Remove the scratch paths of `atomic_path` that killed processes left.

    Call it only where no other process can be writing, for instance under a lock: it would remove their work.
    """
    left = re.compile(rf"\.{re.escape(path.name)}(\.\d+\.[0-9a-f]{{8}})?\.part")  # version 0.1.0 used no numbers
    for scratch in list(path.parent.iterdir()):
        if left.fullmatch(scratch.name):
            remove(scratch)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file in one step: readers see the old content or the new one, never a part.

    Raises:
        OutputError: it cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():  # /dev/stdout or a pipe: renaming onto it would replace it
        with output_errors(path):
            path.write_bytes(content)
        return
    with atomic_path(path) as scratch:
        scratch.write_bytes(content)


def no_folder(path: Path) -> None:
    """Refuse a name for a file that a folder has already.

    Raises:
        OutputError: there is a folder of that name.
    """
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")


@contextlib.contextmanager
def only_writer(path: Path, lock: Path | None = None) -> Iterator[None]:
    """Lock a file or folder, so that only this process writes it. Do not wait for another writer.

    Args:
        path: the file or folder, as errors name it.
        lock: the lock file, in an existing folder; by default a hidden one beside ``path``. It is removed afterwards.

    Raises:
        OutputError: another process holds the lock, or the lock cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock") if lock is None else lock
    with output_errors(path):
        if not lock.parent.is_dir():  # filelock would make the folder, and a mistyped path would not be noticed
            kind = errno.ENOTDIR if lock.parent.exists() else errno.ENOENT
            raise OSError(kind, "No such folder")
        held = FileLock(str(lock))
        try:
            held.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"cannot write '{path}': another run is writing it; wait for it, or choose another"
            ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # before it is released: afterwards the file may be another process's lock
        held.release()
