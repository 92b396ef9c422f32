"""Many pairs: a list in, JSON lines out; each image's features once, resumable, one bad pair no harm to the rest.

The output's first line holds the run's conditions, then one line follows a pair, in the list's order. A line is
complete or absent: a partial last line (the run was killed, the disk was full) is cut off when the run is resumed.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from difftap.errors import DifftapError, InputError, NonFiniteError, OutputError, PairsError
from difftap.features import FeatureMap
from difftap.manifest import output_errors
from difftap.matching import Matches
from difftap.pipeline import Pipeline
from difftap.points import parse_point
from difftap.results import SCHEMA, Threshold, match_records
from difftap.shelf import FeatureShelf

__all__ = ["Pair", "PairsRun", "load_pairs", "run_pairs"]


_REASONS = 5  # of failures, told at the end of a run; the file has them all


@dataclass(frozen=True)
class Pair:
    """One line of the list: two image files and, perhaps, points of the source ``(N, 2)`` in pixels."""

    source: Path
    target: Path
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class PairsRun:
    """What a run did: pairs written now, failures in the whole file, pairs already there, and why the first failed."""

    written: int
    failed: int
    skipped: int
    reasons: tuple[str, ...] = ()


def load_pairs(path: Path) -> list[Pair]:
    """Read a list of pairs: CSV with the columns ``source`` and ``target`` and, optionally, ``points``.

    Paths are relative to the list's folder. ``points`` holds ``x,y`` of the source image, several separated by ``;``.

    Raises:
        PairsError: the file is missing or malformed, or holds no pair; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"pair list '{path}' cannot be read ({error}); give a CSV file") from error
    reader = csv.DictReader(text.splitlines(), restkey="(more)", strict=True)
    pairs = []
    try:
        header = [name.strip().lower() for name in reader.fieldnames or ()]
        if not {"source", "target"} <= set(header):
            raise PairsError(
                f"pair list '{path}' has the columns {', '.join(header) or 'none'}; allowed: source,target[,points]"
            )
        reader.fieldnames = header
        for row in reader:
            where = f"pair list '{path}', line {reader.line_num}"
            if "(more)" in row:
                raise PairsError(f"{where}: more cells than columns; allowed: source,target[,points], points in quotes")
            source, target = (row.get("source") or "").strip(), (row.get("target") or "").strip()
            if not source or not target:
                raise PairsError(f"{where}: source is {source!r}, target is {target!r}; allowed: two image files")
            try:
                points = tuple(parse_point(text) for text in (row.get("points") or "").split(";") if text.strip())
            except DifftapError as error:
                raise PairsError(f"{where}: {error}") from error
            pairs.append(Pair(path.parent / source, path.parent / target, points))
    except csv.Error as error:
        raise PairsError(f"pair list '{path}', line {reader.line_num}: {error}") from error
    if not pairs:
        raise PairsError(f"pair list '{path}' holds no pair; allowed: at least one line of source,target")
    return pairs


Finder = Callable[[FeatureMap, FeatureMap, NDArray[np.float64]], Matches]
"""From two maps and the pair's points (possibly none) to matches."""


def run_pairs(
    pipeline: Pipeline,
    pairs: Sequence[Pair],
    output: Path,
    find: Finder,
    *,
    settings: dict[str, Any],
    threshold: Threshold,
    overwrite: bool = False,
    batch: int = 1,
    memory: int = 2 << 30,
    progress: Callable[[int], None] = lambda count: None,
) -> PairsRun:
    """Match many pairs into a file of JSON lines.

    Args:
        pipeline: the open recipe.
        pairs: what to match.
        output: the JSONL file; continued if an earlier run with the same conditions left it unfinished.
        find: how a pair's points are chosen and matched.
        settings: what decides ``find``; part of the conditions that a resumed run must share.
        threshold: which matches are written.
        overwrite: start afresh whatever ``output`` holds.
        batch: images extracted together.
        memory: bytes of features kept in memory; more goes to a scratch folder.
        progress: called with the number of pairs just finished.

    Raises:
        OutputError: the output cannot be written, belongs to another run, or is being written by one.
        BackendError: the runtime failed, which is no pair's fault; what was written stays, and a later run goes on.
    """
    listing = [[str(p.source), str(p.target), [list(xy) for xy in p.points]] for p in pairs]
    conditions = {
        **pipeline.conditions,
        "settings": settings,
        "pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    header = {"type": "run", "schema": SCHEMA, **conditions}
    with _only_writer(output), tempfile.TemporaryDirectory(prefix="difftap-") as scratch:
        reasons: list[str] = []
        done, failed = (0, 0) if overwrite else _finished(output, header)
        rest = pairs[done:]
        order = [path for pair in rest for path in (pair.source, pair.target)]
        shelf = FeatureShelf(pipeline, order, memory, Path(scratch))
        with (
            output_errors(output),
            open(
                output, "a" if done or _has_header(output, overwrite) else "w", encoding="utf-8", newline="\n"
            ) as handle,
        ):
            if handle.tell() == 0:
                _write_line(handle, header)
            progress(done)
            for index, pair in enumerate(rest):
                shelf.advance(2 * index)
                line = _match_pair(shelf, pair, find, threshold, batch)
                if "error" in line:
                    failed += 1
                    reasons.append(f"pair {done + index}: {line['error']}")
                shown = {"source": str(pair.source), "target": str(pair.target)}
                _write_line(handle, {"type": "pair", "index": done + index, **shown, **line})
                shelf.release(pair.source, pair.target)
                progress(1)
    return PairsRun(len(rest), failed, done, tuple(reasons[:_REASONS]))


def _match_pair(shelf: FeatureShelf, pair: Pair, find: Finder, threshold: Threshold, batch: int) -> dict[str, Any]:
    """One pair's record: its matches, or why there are none."""
    try:
        source, target = shelf.get(pair.source, batch), shelf.get(pair.target, batch)
        matches = find(source, target, np.reshape(np.array(pair.points, np.float64), (-1, 2)))
    except (InputError, NonFiniteError) as error:  # anything else is the machine's fault, and would fail every pair
        return {"error": " ".join(str(error).split())}
    images = {
        name: {k: shelf.record(path)[k] for k in ("width", "height", "sha256")}
        for name, path in (("source_image", pair.source), ("target_image", pair.target))
    }
    return {**images, "matches": match_records(threshold.keep(matches))}


def _write_line(handle: TextIO, record: dict[str, Any]) -> None:
    handle.write(_line(record))
    handle.flush()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"


@contextlib.contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Hold the output for this process alone."""
    with output_errors(output):
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        lock_path = output.with_name(f".{output.name}.lock")
        if not output.parent.exists():  # the lock would make it without a word
            raise FileNotFoundError(errno.ENOENT, "No such folder")
        lock = FileLock(str(lock_path))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"cannot write '{output}': another run is writing it; wait for it, or choose another file"
            ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()  # while it is still held: nobody else's lock is taken away
        lock.release()


def _has_header(output: Path, overwrite: bool) -> bool:
    return not overwrite and output.is_file() and output.stat().st_size > 0


def _finished(output: Path, header: dict[str, Any]) -> tuple[int, int]:
    """How many pairs an earlier run wrote, and how many of them failed; cuts a partial last line off.

    Raises:
        OutputError: the file is no output of ours, or that of a run with other conditions.
    """
    if not _has_header(output, False):
        return 0, 0
    with output_errors(output), open(output, "rb+") as handle:
        first = handle.readline()
        if not first.endswith(b"\n") and _line(header).encode().startswith(first):
            handle.truncate(0)  # killed while writing the very first line
            return 0, 0
        try:
            earlier = json.loads(first)
            if earlier.get("type") != "run":
                raise ValueError("its first line is not a run's")
        except (ValueError, AttributeError) as error:
            raise OutputError(
                f"'{output}' exists and is no output of 'difftap match' ({error}); choose another file, or --overwrite"
            ) from error
        differing = [key for key in header if earlier.get(key) != json.loads(json.dumps(header[key]))]
        if differing:
            raise OutputError(
                f"'{output}' was begun under other conditions ({', '.join(differing)} differ); "
                "choose another file, or --overwrite"
            )
        count = failed = 0
        end = handle.tell()
        for line in handle:
            if not line.endswith(b"\n"):
                break
            count += 1
            failed += b', "error": ' in line
            end += len(line)
        handle.truncate(end)
        os.fsync(handle.fileno())
    return count, failed
