"""Pairs of images matched: two given ones, or a list in and JSON lines out.

Of a list each image's features are made once, the run can be resumed, and a bad pair does no harm to the rest. The
output's first line holds the run's conditions, then one line follows a pair, in the list's order. A line is
complete or absent: a partial last line (the run was killed, the disk was full) is cut off when the run is resumed.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.run import open_run
from difftap.coords import Size
from difftap.errors import DifftapError, InputError, PairsError
from difftap.features.keeper import View
from difftap.features.requests import MapSource, RequestedImage, match_requested, request_pair
from difftap.images import Image
from difftap.matching import Matches, MatchRule, PreparedImage
from difftap.matching.matches import SCHEMA, Threshold, match_records
from difftap.pipeline.pipeline import Provider
from difftap.points import check_inside, grid_points, parse_point
from difftap.recipe import Recipe

__all__ = ["MatchedPair", "Pair", "PairMatching", "PairsRun", "load_pairs", "match_images", "run_pairs"]


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


@dataclass(frozen=True)
class PairMatching:
    """Which points of a pair are matched and which matches are kept: all that a recipe does not say.

    Attributes:
        threshold: which matches are kept.
        mutual: find the points too: cells that are each other's nearest.
        grid: where no points are given, so many times as many over the source image.
        category: what all images show, where learned prompts depend on it.
    """

    threshold: Threshold = field(default_factory=Threshold)
    mutual: bool = False
    grid: int = 5
    category: str | None = None

    def rule(self, recipe: Recipe) -> MatchRule:
        """Say how maps are combined; self-found matches compare all cells with all, which takes one map an image.

        Raises:
            InputError: points are to be found, and the recipe multiplies the scores of several maps.
        """
        several = sum(len(branch.taps) for branch in recipe.branches) > 1
        if self.mutual and several and recipe.combine == "score-product":
            raise InputError("--mutual needs branches that add up; combine is 'score-product': give points instead")
        return MatchRule.of(recipe, "concat" if self.mutual else None)

    def check(self, pipeline: Provider) -> None:
        """Refuse a category that no prompt depends on.

        Raises:
            InputError: there is one.
        """
        if self.category is not None and pipeline.prompts.depends_on != "category":
            raise InputError("--category chooses among learned prompts, and these do not depend on it; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """As plain data: part of the conditions of every match."""
        grid = None if self.mutual else self.grid
        said = {} if self.category is None else {"category": self.category}
        return {"mutual": self.mutual, "grid": grid, **dataclasses.asdict(self.threshold), **said}

    def points(self, size: Size, given: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Choose the points ``(N, 2)`` of a source image of ``(W, H)`` pixels; None if they are to be found.

        Raises:
            PointError: a given point lies outside the image, or the grid is no number of points.
        """
        if given is not None and len(given):
            return check_inside(given, size, "the source image")
        return None if self.mutual else grid_points(size, self.grid)

    def match(self, source: PreparedImage, target: PreparedImage, given: NDArray[np.float64] | None) -> Matches:
        """Match the given points ``(N, 2)``, those of the grid, or mutual ones; not yet those alone that are kept.

        Raises:
            PointError: as `points`.
        """
        points = self.points(source.image_size, given)
        return source.mutual(target) if points is None else source.match(target, points)


@dataclass(frozen=True)
class MatchedPair:
    """Two images matched.

    Attributes:
        source: the image whose points were looked for.
        target: the image they were looked for in.
        found: all matches.
        kept: those that pass the threshold.
        passed: which of all they are, ``(N,)``.
    """

    source: PreparedImage
    target: PreparedImage
    found: Matches
    kept: Matches
    passed: NDArray[np.bool_]

    def heat(self, number: int) -> tuple[int, NDArray[np.float32]]:
        """Score a point against every pixel of the target.

        Args:
            number: of the point, from 1.

        Returns:
            the point's place among the kept ones, from 0; scores ``(H, W)``.

        Raises:
            InputError: the point was not found, or not kept.
        """
        if not 1 <= number <= len(self.passed) or not self.passed[number - 1]:
            raise InputError(f"--heat is {number}, but point {number} of {len(self.passed)} was not found or not kept")
        scores = self.source.heat(self.target, self.found.source[number - 1])
        return int(self.passed[: number - 1].sum()), scores


def match_images(
    pipeline: Provider, source: Image, target: Image, matching: PairMatching, given: NDArray[np.float64] | None = None
) -> MatchedPair:
    """Match two images.

    Args:
        pipeline: the open recipe.
        source: the image whose points are looked for.
        target: the image they are looked for in.
        matching: which points are taken, and which matches kept.
        given: points ``(N, 2)`` of the source, in pixels.

    Raises:
        PointError: a point lies outside the source image.
        InputError: the recipe and the matching exclude each other.
    """
    rule = matching.rule(pipeline.recipe)
    both = pipeline.pair(source, target, matching.category)
    first, second = (rule.prepare(rule.fuse(maps)) for maps in both)
    found = matching.match(first, second, given)
    return MatchedPair(first, second, found, matching.threshold.keep(found), matching.threshold.passed(found))


def run_pairs(
    pipeline: Provider,
    pairs: Sequence[Pair],
    output: Path,
    matching: PairMatching,
    *,
    overwrite: bool = False,
    memory: int = 2 << 30,
    progress: Callable[[int], None] = lambda count: None,
) -> PairsRun:
    """Match many pairs into a file of JSON lines.

    Args:
        pipeline: the open recipe.
        pairs: what to match.
        output: the JSONL file; continued if an earlier run with the same conditions left it unfinished.
        matching: which points are taken, and which matches written.
        overwrite: start afresh whatever ``output`` holds.
        memory: bytes of features kept in memory; more goes to a scratch folder.
        progress: called with the number of pairs just finished.

    Raises:
        InputError: the recipe and the matching exclude each other.
        OutputError: the output cannot be written, belongs to another run, or is being written by one.
        BackendError: the runtime failed, which is no pair's fault; what was written stays, and a later run goes on.
    """
    listing = [[str(p.source), str(p.target), [list(xy) for xy in p.points]] for p in pairs]
    conditions = {
        "schema": SCHEMA,
        **pipeline.conditions,
        "settings": matching.to_dict(),
        "pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    recipe, rule = pipeline.recipe, matching.rule(pipeline.recipe)
    requested = [request_pair(recipe, View(p.source), View(p.target), matching.category) for p in pairs]
    with (
        tempfile.TemporaryDirectory(prefix="difftap-") as scratch,
        open_run(output, conditions, overwrite=overwrite) as run,
    ):
        reasons: list[str] = []
        done, failed = len(run.earlier), sum("error" in record for record in run.earlier)
        rest = pairs[done:]
        source = MapSource(pipeline, rule, [one for both in requested[done:] for one in both], Path(scratch))

        def match(place: int, first: RequestedImage, second: RequestedImage) -> JsonObject:
            return _record(matching, rest[place], first, second)

        results = match_requested(
            source, rule, requested[done:], match, scratch=Path(scratch), memory=memory, batch=pipeline.batch
        )
        progress(done)
        for index, (pair, result) in enumerate(zip(rest, results, strict=True), start=done):
            if isinstance(result, str):
                failed += 1
                reasons.append(f"pair {index}: {result}")
                result = {"error": result}
            shown = {"source": str(pair.source), "target": str(pair.target)}
            run.write({"type": "pair", "index": index, **shown, **result})
            progress(1)
    return PairsRun(len(rest), failed, done, tuple(reasons[:_REASONS]))


def _record(matching: PairMatching, pair: Pair, source: RequestedImage, target: RequestedImage) -> JsonObject:
    """Match a pair, and give its record."""
    images = {
        name: {"width": one.maps.size[0], "height": one.maps.size[1], "sha256": one.maps.digest}
        for name, one in (("source_image", source), ("target_image", target))
    }
    given = np.reshape(np.array(pair.points, np.float64), (-1, 2))
    matches = matching.match(source.prepared, target.prepared, given)
    return {**images, "matches": match_records(matching.threshold.keep(matches))}
