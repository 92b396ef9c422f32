"""Resumable runs: the conditions a run was begun under, the records it has written, and the lock that keeps others out.

Every long command goes through here. A run is a file of JSON lines: the first line holds the conditions, each further
line one finished piece of work. A line is complete or absent: a partial last line (the run was killed, the disk was
full) is cut off when the run is taken up again. Runs whose records lie elsewhere (a feature store keeps them in its own
arrays, a training in its state file) share the comparison of conditions, `check_conditions`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from difftap.artifacts.files import no_folder, only_writer, output_errors
from difftap.errors import InputError, OutputError

__all__ = ["Run", "check_conditions", "differences", "open_run", "read_run"]

_SHOWN = 60
"""Characters of a value that an error shows; a prompt or a list of files may be long."""


class Run:
    """An open run; use `open_run`.

    Attributes:
        earlier: the records that were there when the run was taken up, in order.
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


def differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every field in which two nested values differ, with both values; None stands for a field that is missing.

    Tuples and lists are alike, because JSON knows lists alone.

    >>> list(differences({"size": [8, 8], "recipe": {"seed": 0}}, {"size": (8, 8), "recipe": {"seed": 1}}))
    [('recipe.seed', 0, 1)]
    """
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        for field in dict.fromkeys([*want, *have]):
            yield from differences(have.get(field), want.get(field), f"{name}.{field}" if name else str(field))
    elif isinstance(have, list | tuple) and isinstance(want, list | tuple):
        nested = len(have) == len(want) and any(isinstance(one, Mapping) for one in (*have, *want))
        if nested:
            for index, (one, other) in enumerate(zip(have, want, strict=True)):
                yield from differences(one, other, f"{name}[{index}]")
        elif list(have) != list(want):
            yield name, list(have), list(want)
    elif have != want:
        yield name, have, want


def check_conditions(
    place: object, have: Mapping[str, Any], want: Mapping[str, Any], *, kind: str = "file", begun: str = "begun"
) -> None:
    """Make sure that what lies in a place was begun under the conditions of this run.

    Args:
        place: what lies there, as an error names it.
        have: the conditions it was begun under.
        want: the conditions of this run.
        kind: what to choose another of.
        begun: how far it is: ``begun``, or ``built`` where it is finished.

    Raises:
        OutputError: they differ; the message names the first fields that do, with both values of the first.
    """
    found = list(differences(have, want))
    if not found:
        return
    name, theirs, ours = found[0]
    others = "".join(f"; {field} differs too" for field, _, _ in found[1:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise OutputError(
        f"'{place}' was {begun} under other conditions ({name} is {_short(theirs)} there and {_short(ours)} here"
        f"{others}{more}); choose another {kind}, or --overwrite"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@contextlib.contextmanager
def open_run(
    path: Path, conditions: Mapping[str, Any], *, overwrite: bool = False, place: Path | None = None
) -> Iterator[Run]:
    """Begin a run, or take up one that was begun under the same conditions; nobody else writes it meanwhile.

    Args:
        path: the file of JSON lines.
        conditions: all that decides a record, with the ``schema`` of the file first.
        overwrite: start afresh whatever is there.
        place: what the run makes, as errors name it; the file itself by default.

    Raises:
        OutputError: it cannot be written, is another run's, or is being written.
    """
    header = {"type": "run", **conditions}
    no_folder(path)
    with only_writer(path):
        earlier = [] if overwrite else _finished(path, header, place or path)
        with output_errors(path), open(path, "w" if overwrite else "a", encoding="utf-8", newline="\n") as handle:
            run = Run(handle, earlier)
            if handle.tell() == 0:
                run.write(header)
            yield run
            os.fsync(handle.fileno())


def _finished(path: Path, header: Mapping[str, Any], place: Path) -> list[dict[str, Any]]:
    """Read the whole records that are there, and cut a partial last line off."""
    if not path.is_file() or not path.stat().st_size:
        return []
    with output_errors(path), open(path, "rb+") as handle:
        first = handle.readline()
        if not first.endswith(b"\n") and _line(header).encode().startswith(first):
            handle.truncate(0)  # killed while writing the very first line
            return []
        check_conditions(place, _header(first, path), json.loads(json.dumps(header)))
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
    # Counted as people count: the header is line 1.
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


def read_run(path: Path, schema: str, made_by: str) -> tuple[dict[str, Any], Sequence[dict[str, Any]]]:
    """Read a run's conditions and its whole records; a partial last line is left out.

    Args:
        path: the file.
        schema: what its conditions must say.
        made_by: the command that writes such files, as an error names it.

    Raises:
        InputError: the file is missing, damaged, no run, or of another schema.
    """
    try:
        with open(path, "rb") as handle:
            lines = handle.read().split(b"\n")[:-1]  # what follows the last line end is partial, or nothing
        header, *records = [json.loads(line) for line in lines]
        if header.get("type") != "run" or not all(isinstance(record, dict) for record in records):
            raise ValueError("its first line is no run's header")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"'{path}' cannot be read ({error}); give a file that '{made_by}' wrote") from error
    if header.get("schema") != schema:
        raise InputError(f"'{path}' has schema {header.get('schema')!r}; this difftap reads {schema!r}")
    return header, records
