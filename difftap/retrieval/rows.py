"""What is known of an index's rows: class, image, instance and position; kept as Parquet beside the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path
from difftap.errors import ArtefactError, InputError, first_line, require

__all__ = ["Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Facts of N rows.

    Attributes:
        classes: ``(N,)`` str; empty where unknown.
        images: ``(N,)`` str: the data set's key of the image, or its path.
        instances: ``(N,)`` str: the object's identity; empty for patches.
        x: ``(N,)`` float32, pixels of the image; NaN where the row is no place (an object).
        y: ``(N,)`` float32, likewise.
        boxes: ``(N,)`` str: an object's box, ``x0 y0 x1 y1`` in pixels, ends excluded; empty where it is not known.
    """

    classes: NDArray[np.str_]
    images: NDArray[np.str_]
    instances: NDArray[np.str_]
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    boxes: NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, np.str_))

    def __post_init__(self) -> None:
        if not len(self.boxes):
            object.__setattr__(self, "boxes", np.full(len(self.classes), "", np.str_))
        for name in ("classes", "images", "instances", "boxes"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.str_))
        for name in ("x", "y"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32))
        shapes = {getattr(self, f.name).shape for f in fields(self)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise InputError(f"facts of rows have the shapes {sorted(shapes)}; allowed: one entry a row")

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def objects(
        cls, classes: Sequence[str], images: Sequence[str], instances: Sequence[str], boxes: Sequence[str] = ()
    ) -> Rows:
        """Rows that are objects, without a position."""
        x, y = np.full((2, len(classes)), np.nan, np.float32)
        names = [np.array(column, np.str_) for column in (classes, images, instances, boxes)]
        return cls(names[0], names[1], names[2], x, y, names[3])

    def take(self, rows: NDArray[Any] | slice) -> Rows:
        """Some of the rows."""
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Rows one after the other."""
        if not parts:
            return cls.objects([], [], [])
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def record(self, row: int) -> dict[str, Any]:
        """One row as plain data."""
        x, y = float(self.x[row]), float(self.y[row])
        return {
            "class": str(self.classes[row]) or None,
            "image": str(self.images[row]),
            "instance": str(self.instances[row]) or None,
            "position": None if np.isnan(x) or np.isnan(y) else {"x": round(x, 2), "y": round(y, 2)},
            "box": [int(one) for one in str(self.boxes[row]).split()] or None,
        }

    def save(self, path: Path) -> None:
        """Write them as Parquet, whole or not at all.

        Raises:
            OutputError: it cannot be written.
            MissingExtraError: pyarrow is not installed.
        """
        arrow, parquet = _arrow()
        columns = {
            f.name: arrow.array(
                getattr(self, f.name).tolist(), arrow.float32() if f.name in ("x", "y") else arrow.string()
            )
            for f in fields(self)
        }
        with atomic_path(path) as scratch:
            parquet.write_table(arrow.table(columns), scratch, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is damaged.
        """
        arrow, parquet = _arrow()
        try:
            table = parquet.read_table(path, memory_map=False)
            names = [name for name in ("classes", "images", "instances", "boxes") if name in table.column_names]
            texts = {name: np.array(table.column(name).to_pylist(), np.str_) for name in names}
            return cls(**texts, x=table.column("x").to_numpy(), y=table.column("y").to_numpy())
        except (arrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise ArtefactError(f"'{path}' cannot be read ({first_line(error)}); build the index again") from error


def _arrow() -> tuple[Any, Any]:
    why = "an index's rows"
    return require("pyarrow", "index", why), require("pyarrow.parquet", "index", why)
