"""Matches: the result, the thresholds that say which to keep, and the plain data that commands print and write."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from difftap.images import Image

__all__ = ["SCHEMA", "Matches", "Threshold", "image_record", "match_records"]

SCHEMA = 1
"""Version of the JSON form of matches; docs/output.md describes it."""


@dataclass(frozen=True)
class Matches:
    """Source points, and where they were found on the target.

    Attributes:
        source: ``(N, 2)`` pixels ``(x, y)`` of the source image.
        target: ``(N, 2)`` pixels of the target image; NaN where there is no match (only ``mutual`` gives none).
        score: ``(N,)`` cosine of the two vectors, -1 to 1, higher is better; NaN where there is no match.
        margin: ``(N,)`` lead over the second-best place: the peak's score less the best score farther away than 2 cells
            of the target's map (`difftap.matching.confidence.RADIUS_CELLS`). 0 to 2, higher is surer; NaN if it was not
            asked for, if there is no match, or if nothing lies that far away.
        cycle_error: ``(N,)`` distance in source pixels between the point and the place that its match is matched back
            to by the same matcher. Lower is surer; NaN if it was not asked for or there is no match.
    """

    source: NDArray[np.float64]
    target: NDArray[np.float64]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    cycle_error: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Threshold:
    """Which matches are sure enough to keep. None sets no threshold.

    Attributes:
        min_score: lowest score.
        min_margin: lowest margin.
        max_cycle_error: largest cycle error, in source pixels.
    """

    min_score: float | None = None
    min_margin: float | None = None
    max_cycle_error: float | None = None

    def passed(self, matches: Matches) -> NDArray[np.bool_]:
        """Tell which of N matches pass, ``(N,)``; those without a target pass only if no threshold is set."""
        passed = np.ones(len(matches), np.bool_)
        # NaN compares false, so a match that lacks a figure does not pass a threshold on it.
        if self.min_score is not None:
            passed &= matches.score >= self.min_score
        if self.min_margin is not None:
            passed &= matches.margin >= self.min_margin
        if self.max_cycle_error is not None:
            passed &= matches.cycle_error <= self.max_cycle_error
        return passed

    def keep(self, matches: Matches) -> Matches:
        """Select the matches that pass."""
        passed = self.passed(matches)
        return Matches(**{f.name: getattr(matches, f.name)[passed] for f in dataclasses.fields(matches)})


def _number(value: float, digits: int) -> float | None:
    """Round a number for JSON, which has no NaN."""
    return None if not math.isfinite(value) else round(float(value), digits)


def _point(xy: NDArray[np.float64]) -> dict[str, float] | None:
    return None if not np.isfinite(xy).all() else {"x": round(float(xy[0]), 3), "y": round(float(xy[1]), 3)}


def match_records(matches: Matches) -> list[dict[str, object]]:
    """Make one record per match, in order, in pixels; a point without a match has a ``target`` of None."""
    return [
        {
            "source": _point(matches.source[i]),
            "target": _point(matches.target[i]),
            "score": _number(matches.score[i], 6),
            "margin": _number(matches.margin[i], 6),
            "cycle_error": _number(matches.cycle_error[i], 3),
        }
        for i in range(len(matches.source))
    ]


def image_record(image: Image) -> dict[str, object]:
    """Give what identifies an image: path, size in pixels, and the hash of its pixels."""
    return {"path": image.path, "width": image.size[0], "height": image.size[1], "sha256": image.digest}
