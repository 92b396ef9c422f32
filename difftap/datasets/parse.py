"""What annotations hold: lists of pairs, numbers, boxes, keypoints."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.coords import Size
from difftap.datasets.layout import BadPairError, DatasetError, Tree, draw_tree
from difftap.datasets.samples import Box, Sample

__all__ = ["Line", "Side", "joined", "points_array", "read_list", "to_box", "to_number"]


@dataclass(frozen=True)
class Line:
    """A line of a list: what to call it, its cells, and the columns' names."""

    label: str
    cells: tuple[str, ...]
    header: tuple[str, ...]

    def row(self) -> dict[str, str]:
        """Column -> cell.

        Raises:
            BadPairError: the line has too few cells or too many.
        """
        if len(self.cells) != len(self.header):
            raise BadPairError("malformed", f"{len(self.cells)} cells; the header has {len(self.header)}")
        return dict(zip(self.header, self.cells, strict=True))


def read_list(path: Path, columns: Sequence[str], root: Path, tree: Tree) -> list[Line]:
    """The lines of a CSV with a header; blank ones are skipped.

    Raises:
        DatasetError: it cannot be read, is empty, or lacks one of the columns.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle)
            rows = [(reader.line_num, tuple(map(str.strip, row))) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"'{path}' cannot be read as CSV ({error}); restore it") from error
    if not rows:
        raise DatasetError(f"'{path}' is empty; a list of pairs has a header and a line for each pair")
    header = rows[0][1]
    absent = [column for column in columns if column not in header]
    if absent:
        raise DatasetError(f"'{path}' lacks the columns {', '.join(absent)}; restore it", draw_tree(root, tree))
    return [Line(f"{path.name} line {number}", cells, header) for number, cells in rows[1:]]


def to_number(text: str) -> float:
    """A cell's number; NaN if it is empty, which is how some lists mark an absent keypoint."""
    try:
        return float(text) if text.strip() else float("nan")
    except ValueError:
        raise BadPairError("malformed", f"'{text}' is not a number") from None


def to_box(values: Any) -> Box:
    """Four numbers as a box; it may reach beyond the image, but not be empty, nor inside out."""
    numbers = np.asarray(values, np.float64).ravel()
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise BadPairError("malformed", f"the box {numbers.tolist()} is not x1, y1, x2, y2")
    x1, y1, x2, y2 = (float(value) for value in numbers)
    if x2 < x1 or y2 < y1 or (x1 == x2 and y1 == y2):
        raise BadPairError("malformed", f"the box {numbers.tolist()} is empty or inside out")
    return x1, y1, x2, y2


def points_array(points: Any) -> NDArray[np.float64]:
    """Keypoints as ``(N, 2)``, ``(0, 2)`` if there are none; one that is null, or half so, is NaN."""
    filled = [(None, None) if point is None else point for point in points]
    return np.asarray(filled, np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class Side:
    """One image of a pair.

    Attributes:
        image: its file.
        size: ``(W, H)``.
        points: ``(M, 2)``, a row for each keypoint of the class; not finite where it is absent.
        box: the object's box, if annotated.
    """

    image: Path
    size: Size
    points: NDArray[np.float64]
    box: Box | None = None


def joined(name: str, category: str, sides: Sequence[Side], ids: Sequence[str], *, mirrored: bool = False) -> Sample:
    """The pair of two images whose keypoints have the same names ``ids``; absent ones are left out.

    Raises:
        BadPairError: the images do not have a keypoint, present or absent, for each name.
    """
    source, target = sides
    if not len(source.points) == len(target.points) == len(ids):
        counts = f"{len(source.points)} and {len(target.points)}"
        raise BadPairError("malformed", f"the images have {counts} keypoints, absent ones included; must be equal")
    there = [np.asarray(np.isfinite(side.points).all(axis=1), np.bool_) for side in sides]
    both = np.asarray(there[0] & there[1], np.bool_)
    return Sample(
        name=name,
        source=source.image,
        target=target.image,
        category=category,
        source_points=source.points[both],
        target_points=target.points[both],
        keypoint_ids=tuple(key for key, kept in zip(ids, both, strict=True) if kept),
        target_visible=target.points[there[1]],
        target_ids=tuple(key for key, kept in zip(ids, there[1], strict=True) if kept),
        source_size=source.size,
        target_size=target.size,
        source_box=source.box,
        target_box=target.box,
        mirrored=mirrored,
    )
