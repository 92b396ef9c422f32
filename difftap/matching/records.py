"""Matches as plain data: what ``difftap match`` prints and writes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.images import Image
from difftap.matching import Matches

__all__ = ["SCHEMA", "Threshold", "image_record", "match_records"]

SCHEMA = 1
"""Version of the JSON that matches are written in; docs/output.md describes it."""


@dataclass(frozen=True)
class Threshold:
    """Which matches are sure enough to keep.

    Attributes:
        min_score: lowest cosine.
        min_margin: lowest lead over the best other place.
        max_cycle_error: largest distance, in source pixels, between a point and where its match leads back to.
    """

    min_score: float | None = None
    min_margin: float | None = None
    max_cycle_error: float | None = None

    def passed(self, matches: Matches) -> NDArray[np.bool_]:
        """Which of N matches pass, ``(N,)``; those without a target pass only if no threshold is set."""
        passed = np.ones(len(matches), np.bool_)
        # A NaN compares false: a match that has no such figure does not pass a threshold on it.
        if self.min_score is not None:
            passed &= matches.score >= self.min_score
        if self.min_margin is not None:
            passed &= matches.margin >= self.min_margin
        if self.max_cycle_error is not None:
            passed &= matches.cycle_error <= self.max_cycle_error
        return passed

    def keep(self, matches: Matches) -> Matches:
        """The matches that pass."""
        passed = self.passed(matches)
        return Matches(**{f.name: getattr(matches, f.name)[passed] for f in dataclasses.fields(matches)})


def _number(value: float, digits: int) -> float | None:
    return None if not math.isfinite(value) else round(float(value), digits)


def _point(xy: Any) -> dict[str, float] | None:
    return None if not np.isfinite(xy).all() else {"x": round(float(xy[0]), 3), "y": round(float(xy[1]), 3)}


def match_records(matches: Matches) -> list[dict[str, Any]]:
    """One record a match, in order; a match that was not found has a ``target`` of None."""
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


def image_record(image: Image) -> dict[str, Any]:
    """What identifies an image: path, size in pixels, and the hash of its pixels."""
    return {"path": image.path, "width": image.size[0], "height": image.size[1], "sha256": image.digest}
