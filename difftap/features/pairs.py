"""Many pairs: a list in, JSON lines out; each image's features once, resumable, one bad pair no harm to the rest.

The output's first line holds the run's conditions, then one line follows a pair, in the list's order. A line is
complete or absent: a partial last line (the run was killed, the disk was full) is cut off when the run is resumed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.run import open_run
from difftap.errors import DifftapError, InputError, NonFiniteError, PairsError
from difftap.features.keeper import MapKeeper, View
from difftap.features.requests import MapRequest, MapSource, request_pair
from difftap.matching import Matches, MatchRule, PreparedImage
from difftap.matching.matches import SCHEMA, Threshold, match_records
from difftap.pipeline.pipeline import Provider
from difftap.points import parse_point

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


Finder = Callable[[PreparedImage, PreparedImage, NDArray[np.float64]], Matches]
"""From two images made ready and the pair's points (possibly none) to matches."""


def run_pairs(
    pipeline: Provider,
    pairs: Sequence[Pair],
    output: Path,
    find: Finder,
    *,
    rule: MatchRule,
    settings: dict[str, Any],
    threshold: Threshold,
    overwrite: bool = False,
    batch: int = 1,
    memory: int = 2 << 30,
    category: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> PairsRun:
    """Match many pairs into a file of JSON lines.

    Args:
        pipeline: the open recipe.
        pairs: what to match.
        output: the JSONL file; continued if an earlier run with the same conditions left it unfinished.
        find: how a pair's points are chosen and matched.
        rule: how an image's maps become one thing to match.
        settings: what decides ``find``; part of the conditions that a resumed run must share.
        threshold: which matches are written.
        overwrite: start afresh whatever ``output`` holds.
        batch: images extracted together.
        memory: bytes of features kept in memory; more goes to a scratch folder.
        category: what all images show, where learned prompts depend on it.
        progress: called with the number of pairs just finished.

    Raises:
        OutputError: the output cannot be written, belongs to another run, or is being written by one.
        BackendError: the runtime failed, which is no pair's fault; what was written stays, and a later run goes on.
    """
    listing = [[str(p.source), str(p.target), [list(xy) for xy in p.points]] for p in pairs]
    conditions = {
        "schema": SCHEMA,
        **pipeline.conditions,
        "settings": settings,
        "pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    requested = [request_pair(pipeline.recipe, View(p.source), View(p.target), category) for p in pairs]
    with (
        tempfile.TemporaryDirectory(prefix="difftap-") as scratch,
        open_run(output, conditions, overwrite=overwrite) as run,
    ):
        reasons: list[str] = []
        done, failed = len(run.earlier), sum("error" in record for record in run.earlier)
        rest = pairs[done:]
        order = [request for both in requested[done:] for request in both]
        source = MapSource(pipeline, rule, order, Path(scratch))
        keeper = MapKeeper(source, rule.prepare, order, memory, Path(scratch), max(1, batch))
        progress(done)
        for index, (pair, both) in enumerate(zip(rest, requested[done:], strict=True), start=done):
            line = _match_pair(keeper, pair, both, find, threshold)
            if "error" in line:
                failed += 1
                reasons.append(f"pair {index}: {line['error']}")
            shown = {"source": str(pair.source), "target": str(pair.target)}
            run.write({"type": "pair", "index": index, **shown, **line})
            keeper.done(*both)
            progress(1)
    return PairsRun(len(rest), failed, done, tuple(reasons[:_REASONS]))


def _match_pair(
    keeper: MapKeeper[MapRequest],
    pair: Pair,
    both: tuple[MapRequest, MapRequest],
    find: Finder,
    threshold: Threshold,
) -> dict[str, Any]:
    """One pair's record: its matches, or why there are none."""
    try:
        source, target = map(keeper.prepared, both)
        records = {
            name: {"width": made.size[0], "height": made.size[1], "sha256": made.digest}
            for name, made in zip(("source_image", "target_image"), map(keeper.get, both), strict=True)
        }
        matches = find(source, target, np.reshape(np.array(pair.points, np.float64), (-1, 2)))
    except (InputError, NonFiniteError) as error:  # anything else is the machine's fault, and would fail every pair
        return {"error": " ".join(str(error).split())}
    return {**records, "matches": match_records(threshold.keep(matches))}
