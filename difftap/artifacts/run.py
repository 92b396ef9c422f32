"""Resumable runs: the conditions a run began under, the records it has written, and a lock against a second writer.

Every command that can be resumed uses this file. A run is a file of JSON lines: the first line holds the conditions,
each further line one finished piece of work. When a run is resumed, a partial last line (the run was killed, or the
disk was full) is cut off. Runs that keep their records elsewhere (a feature store in its own arrays, a training in
its state file) share the comparison of conditions, `check_conditions`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from difftap.artifacts.files import JsonObject, no_folder, only_writer, output_errors
from difftap.errors import InputError, OutputError

__all__ = ["ProgressBar", "Run", "check_conditions", "differences", "no_bar", "open_run", "read_run"]

ProgressBar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar for a number of pieces of work; its context gives a function to call with each number done."""

_SHOWN = 60
"""Characters of a value that an error shows; a prompt or a list of files may be long."""


def no_bar(_total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress bar: a `ProgressBar` for callers that want none."""
    return contextlib.nullcontext(lambda _count: None)


class Run:
    """An open run; use `open_run`.

    Attributes:
        earlier: the records that the file held when the run was resumed, in order.
    """

    def __init__(self, handle: TextIO, earlier: list[JsonObject]) -> None:
        self._handle = handle
        self.earlier = earlier

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record and hand it to the system, so that it outlives this process.

        Raises:
            ValueError: the record holds NaN or infinity, which JSON has no words for.
        """
        self._handle.write(_line(record))
        self._handle.flush()


def _line(record: Mapping[str, object]) -> str:
    # ASCII: a file name may hold bytes that are no valid text, and UTF-8 could not be written for them.
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"


def differences(have: object, want: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield the name and both values of every field in which two nested values differ.

    A missing field counts as None. Tuples equal lists, because JSON has only lists.

    >>> list(differences({"size": [8, 8], "recipe": {"seed": 0}}, {"size": (8, 8), "recipe": {"seed": 1}}))
    [('recipe.seed', 0, 1)]
    """
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        for field in dict.fromkeys([*want, *have]):
            yield from differences(have.get(field), want.get(field), f"{name}.{field}" if name else str(field))
    elif isinstance(have, list | tuple) and isinstance(want, list | tuple):
        # Lists of mappings (branches, for instance) are compared entry by entry, so that the message can name the
        # field. Plain lists are shown whole: "taps is ['up1'] there and ['up2'] here".
        nested = len(have) == len(want) and any(isinstance(one, Mapping) for one in (*have, *want))
        if nested:
            for index, (one, other) in enumerate(zip(have, want, strict=True)):
                yield from differences(one, other, f"{name}[{index}]")
        elif list(have) != list(want):
            yield name, list(have), list(want)
    elif have != want:
        yield name, have, want


def check_conditions(
    place: object, have: Mapping[str, object], want: Mapping[str, object], *, kind: str = "file", begun: str = "begun"
) -> None:
    """Make sure that an existing output was begun under the conditions of this run.

    Args:
        place: the output, as an error names it.
        have: the conditions it was begun under.
        want: the conditions of this run.
        kind: what the user may choose another of: ``file``, ``folder``.
        begun: how far the output is: ``begun``, or ``built`` if it is finished.

    Raises:
        OutputError: the conditions differ; the message names up to three fields, and both values of the first.
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@contextlib.contextmanager
def open_run(
    path: Path, conditions: Mapping[str, object], *, overwrite: bool = False, place: Path | None = None
) -> Iterator[Run]:
    """Begin a run, or resume one that began under the same conditions. The file is locked meanwhile.

    Args:
        path: the file of JSON lines.
        conditions: all that decides a record, with the ``schema`` of the file first.
        overwrite: begin again, whatever the file holds.
        place: the run's output, as errors name it; by default the file itself.

    Raises:
        OutputError: the file cannot be written, belongs to another run, or is being written by another process.
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
            os.fsync(handle.fileno())  # once, at the end: after each record it would slow down a fast run


def _finished(path: Path, header: Mapping[str, object], place: Path) -> list[JsonObject]:
    """Read the complete records of a file, and cut off a partial last line.

    Raises:
        OutputError: it is another run's file, or none, or a record is damaged.
    """
    if not path.is_file() or not path.stat().st_size:
        return []
    with output_errors(path), open(path, "rb+") as handle:
        first = handle.readline()
        if not first.endswith(b"\n") and _line(header).encode().startswith(first):
            handle.truncate(0)  # killed while writing the very first line
            return []
        # Through JSON, since the file's header came through it: tuples are lists there, and keys are texts.
        check_conditions(place, _header(first, path), json.loads(json.dumps(header)))
        records: list[JsonObject] = []
        end = handle.tell()
        for line in handle:
            if not line.endswith(b"\n"):
                break
            records.append(_record(line, path, len(records)))
            end += len(line)
        handle.truncate(end)
    return records


def _record(line: bytes, path: Path, number: int) -> JsonObject:
    try:
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    except ValueError:
        pass
    # An editor counts lines from 1, and the header is line 1.
    raise OutputError(f"'{path}', line {number + 2} is damaged; choose another file, or --overwrite")


def _header(line: bytes, path: Path) -> JsonObject:
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


def read_run(path: Path, schema: str, made_by: str) -> tuple[JsonObject, Sequence[JsonObject]]:
    """Read a run's conditions and its complete records, without a partial last line.

    Args:
        path: the file.
        schema: the schema that its conditions must name.
        made_by: the command that writes such files, as an error names it.

    Raises:
        InputError: the file is missing or damaged, is no run, or has another schema.
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
