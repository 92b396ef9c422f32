"""Files that people are left with: whole or not there, one writer at a time, and one clear line when they fail."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from difftap.errors import OutputError

__all__ = ["atomic_path", "no_folder", "only_writer", "output_errors", "remove", "sweep", "write_atomic"]


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's complaint about a path we write to into one clear line.

    Raises:
        OutputError: in place of any other OSError.
    """
    try:
        yield
    except OutputError:
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
    """Yield a scratch path beside ``path``; on success it takes the place of ``path``, on failure it is removed.

    A file is replaced in one step. What is written may also be a folder: an old one is then removed first, so folders
    need a manifest, or a reader that waits.

    Raises:
        OutputError: it cannot be written or moved into place.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with output_errors(path):
            yield scratch
            if scratch.is_dir():
                remove(path)  # no system moves a folder over a full one
            elif os.name != "nt":  # Windows syncs only what is open for writing
                with open(scratch, "rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            remove(scratch)


def sweep(path: Path) -> None:
    """Remove the scratch paths of `atomic_path` that killed processes left; only where nobody else can be writing."""
    left = re.compile(rf"\.{re.escape(path.name)}(\.\d+\.[0-9a-f]{{8}})?\.part")  # without numbers: version 0.1.0's
    for scratch in list(path.parent.iterdir()):
        if left.fullmatch(scratch.name):
            remove(scratch)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file at once; readers see the old one or the new one, never part of either."""
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced
        with output_errors(path):
            path.write_bytes(content)
        return
    with atomic_path(path) as scratch:
        scratch.write_bytes(content)


def no_folder(path: Path) -> None:
    """Make sure that a file can be written under this name.

    Raises:
        OutputError: a folder stands there.
    """
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")


@contextlib.contextmanager
def only_writer(path: Path, lock: Path | None = None) -> Iterator[None]:
    """Hold a file or folder that is written to for this process alone, without waiting.

    Args:
        path: what is written, as an error names it.
        lock: the lock file; by default a hidden one beside ``path``, whose folder must exist. It is removed afterwards.

    Raises:
        OutputError: another process holds it, or the lock cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock") if lock is None else lock
    with output_errors(path):
        if not lock.parent.is_dir():  # filelock would make it without a word
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
            lock.unlink()  # while it is still held: nobody else's lock is taken away
        held.release()
