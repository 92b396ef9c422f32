"""A file of JSON lines that a run appends to and can take up again: its conditions, then one line a record.

A line is complete or absent: a partial last line (the run was killed, the disk was full) is cut off on resuming.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from difftap.artifacts.files import no_folder, only_writer, output_errors
from difftap.errors import InputError, OutputError

__all__ = ["Journal", "open_journal", "read_journal"]


class Journal:
    """An open journal; use `open_journal`.

    Attributes:
        earlier: the records that an earlier run had written, in order.
    """

    def __init__(self, handle: TextIO, earlier: list[dict[str, Any]]) -> None:
        self._handle = handle
        self.earlier = earlier

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is on its way to the disk when this returns."""
        self._handle.write(_line(record))
        self._handle.flush()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"  # ASCII: a file's name may be no valid text


@contextlib.contextmanager
def open_journal(path: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Journal]:
    """Begin a journal, or take up one that was begun under the same conditions.

    Args:
        path: the file.
        header: the run's conditions; an earlier header must hold the same.
        overwrite: start afresh whatever is there.

    Raises:
        OutputError: it cannot be written, is another run's, or is being written.
    """
    no_folder(path)
    with only_writer(path):
        earlier = [] if overwrite else _finished(path, header)
        with output_errors(path), open(path, "w" if overwrite else "a", encoding="utf-8", newline="\n") as handle:
            journal = Journal(handle, earlier)
            if handle.tell() == 0:
                journal.write(header)
            yield journal
            os.fsync(handle.fileno())


def _finished(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole records that are there; cuts a partial last line off."""
    if not path.is_file() or not path.stat().st_size:
        return []
    with output_errors(path), open(path, "rb+") as handle:
        first = handle.readline()
        if not first.endswith(b"\n") and _line(header).encode().startswith(first):
            handle.truncate(0)  # killed while writing the very first line
            return []
        earlier = _header(first, path)
        wanted = json.loads(json.dumps(header))
        differing = [key for key in {**wanted, **earlier} if earlier.get(key) != wanted.get(key)]
        if differing:
            raise OutputError(
                f"'{path}' was begun under other conditions ({', '.join(differing)} differ); choose another file, or "
                "--overwrite"
            )
        records: list[dict[str, Any]] = []
        end = handle.tell()
        for line in handle:
            if not line.endswith(b"\n"):
                break
            records.append(_record(line, path, len(records)))
            end += len(line)
        handle.truncate(end)
    return records


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    except ValueError:
        pass
    raise OutputError(f"'{path}', line {number + 2} is damaged; choose another file, or --overwrite")


def _header(line: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if isinstance(header, dict) and header.get("type") == "run":
            return header
    except ValueError:
        pass
    raise OutputError(
        f"'{path}' exists and is no output of ours (its first line is no run's header); choose another file, or "
        "--overwrite"
    )


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A journal's header and its whole records; a partial last line is left out.

    Raises:
        InputError: the file is missing or no journal.
    """
    try:
        with open(path, "rb") as handle:
            lines = handle.read().split(b"\n")[:-1]  # what follows the last line end is partial, or nothing
        header, *records = [json.loads(line) for line in lines]
        if header.get("type") != "run" or not all(isinstance(record, dict) for record in records):
            raise ValueError("its first line is no run's header")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"'{path}' cannot be read as predictions ({error}); give a file that 'difftap bench pck' wrote"
        ) from error
    return header, records
