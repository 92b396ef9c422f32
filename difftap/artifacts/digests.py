"""Remembered hashes of large files, so that gigabytes of weights are not read again at every start.

A hash belongs to a file (its device and inode), not to a name, because the cache holds hard links to checkpoints'
weights. It holds as long as the file's size and modification time stay the same. The change time is not compared:
making a hard link changes it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from difftap.artifacts.files import write_atomic
from difftap.artifacts.manifest import file_digest
from difftap.errors import OutputError

__all__ = ["DigestMemo"]

SMALL = 64 << 20
"""Files up to this many bytes are hashed every time, in a few hundredths of a second."""


class DigestMemo:
    """SHA-256 of files, remembered in a JSON file for the large ones."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _load(self) -> dict[str, list[object]]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            return data if isinstance(data, dict) else {}
        except (OSError, ValueError):  # none yet, or damaged: then files are hashed again
            return {}

    def digest(self, path: Path) -> str:
        """Give a file's SHA-256 as 64 hexadecimal digits; an unchanged large file is read only once.

        Raises:
            OSError: the file cannot be read.
        """
        stat = path.stat()
        if stat.st_size <= SMALL:
            return file_digest(path)
        stamp: list[object] = [stat.st_size, stat.st_mtime_ns]
        name = f"{stat.st_dev}:{stat.st_ino}"
        known = self._load().get(name)
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        digest = file_digest(path)
        with contextlib.suppress(OutputError, OSError):  # if it cannot be written, the next start is just slower
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Read again just before writing, to keep what other processes have added meanwhile.
            write_atomic(self._path, json.dumps({**self._load(), name: [*stamp, digest]}))
        return digest
