"""Points from the user: the command line, CSV and JSON files, or a grid."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.coords import Geometry, Size
from difftap.errors import PointError

__all__ = ["check_inside", "grid_points", "load_points", "parse_point"]

MAX_GRID = 512
"""Most points on a side of a grid: a quarter of a million in all, each with a row of similarities to be computed."""


def _pair(x: object, y: object, where: str) -> tuple[float, float]:
    try:
        if isinstance(x, bool) or isinstance(y, bool):  # float(True) would be 1.0
            raise ValueError
        point = (float(x), float(y))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise PointError(f"{where}: x, y is {x!r}, {y!r}; allowed: two numbers, in pixels") from error
    if not all(map(math.isfinite, point)):
        raise PointError(f"{where}: x, y is {x!r}, {y!r}; allowed: two finite numbers, in pixels")
    return point


def parse_point(text: str) -> tuple[float, float]:
    """Read ``"x,y"``.

    >>> parse_point("12,30.5")
    (12.0, 30.5)
    """
    parts = text.split(",")
    if len(parts) != 2:
        raise PointError(f"point '{text}' is not of the form x,y; allowed: two numbers in pixels, such as 120,80")
    return _pair(parts[0], parts[1], f"point '{text}'")


def load_points(path: Path) -> NDArray[np.float64]:
    """Read points ``(N, 2)``, as ``x, y`` in image pixels, from a CSV or JSON file.

    CSV: a header with the columns ``x`` and ``y`` (others are ignored), or two bare columns. JSON: a list of ``[x, y]``
    or of objects with ``x`` and ``y``, or an object whose ``points`` is such a list.

    Raises:
        PointError: the file is missing, malformed or holds no point; the message names the line or entry.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark before the header
    except (OSError, UnicodeDecodeError) as error:
        raise PointError(f"points file '{path}' cannot be read ({error}); give a CSV or JSON file") from error
    points = _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)
    if not points:
        raise PointError(f"points file '{path}' holds no point; allowed: at least one x,y")
    return np.array(points, np.float64)


def _from_csv(text: str, path: Path) -> list[tuple[float, float]]:
    try:
        rows = [(n, row) for n, row in enumerate(csv.reader(text.splitlines()), start=1) if any(c.strip() for c in row)]
    except csv.Error as error:
        raise PointError(f"points file '{path}' is not valid CSV ({error})") from error
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0][1]]
    columns = (0, 1)
    if "x" in header and "y" in header:
        columns = (header.index("x"), header.index("y"))
        rows = rows[1:]
    elif len(rows[0][1]) > 2:  # a number before x and y, or a name behind them? Nothing tells.
        raise PointError(
            f"points file '{path}' has {len(rows[0][1])} columns and no header with x and y; allowed: two columns, or "
            "a first line that names them, such as name,x,y"
        )
    width = len(header)
    points = []
    for number, row in rows:
        if len(row) <= max(columns) or len(row) > width:
            raise PointError(f"points file '{path}', line {number}: {','.join(row)!r}; allowed: columns x,y")
        points.append(_pair(row[columns[0]], row[columns[1]], f"points file '{path}', line {number}"))
    return points


def _from_json(text: str, path: Path) -> list[tuple[float, float]]:
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise PointError(f"points file '{path}' is not valid JSON ({error})") from error
    entries = data.get("points") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise PointError(f"points file '{path}' should hold a list of points, such as [[120, 80], [40, 30]]")
    points = []
    for i, entry in enumerate(entries):
        where = f"points file '{path}', entry {i}"
        if isinstance(entry, dict) and "x" in entry and "y" in entry:
            points.append(_pair(entry["x"], entry["y"], where))
        elif isinstance(entry, list) and len(entry) == 2:
            points.append(_pair(entry[0], entry[1], where))
        else:
            raise PointError(f"{where}: {entry!r}; allowed: [x, y] or an object with x and y")
    return points


def grid_points(size: Size, count: int) -> NDArray[np.float64]:
    """Divide an image of ``(W, H)`` pixels into ``count`` x ``count`` parts; give their centres ``(count^2, 2)``.

    The order is row by row.

    >>> grid_points((4, 2), 2).tolist()
    [[0.5, 0.0], [2.5, 0.0], [0.5, 1.0], [2.5, 1.0]]
    """
    if not 1 <= count <= MAX_GRID:
        raise PointError(f"grid is {count}; allowed: 1 to {MAX_GRID} points a side")
    xs, ys = ((np.arange(count) + 0.5) * side / count - 0.5 for side in size)
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def check_inside(points: ArrayLike, size: Size, what: str) -> NDArray[np.float64]:
    """Return the points ``(N, 2)``, if all of them lie on an image of ``(W, H)`` pixels.

    Args:
        points: ``x, y`` in pixels.
        size: of the image.
        what: the image, as an error names it.

    Raises:
        PointError: a point lies outside; the message names the first.
    """
    xy = np.reshape(np.asarray(points, np.float64), (-1, 2))
    outside = np.flatnonzero(~Geometry.stretch(size, size).contains(xy))
    if outside.size:
        x, y = xy[outside[0]]
        raise PointError(
            f"point {x:g},{y:g} lies outside {what}, which is {size[0]} x {size[1]} pixels; "
            f"allowed: x from -0.5 to {size[0] - 0.5:g}, y from -0.5 to {size[1] - 0.5:g}"
        )
    return xy
