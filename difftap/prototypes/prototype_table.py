"""The table of prototypes: for each object a vector and its description, kept as one Parquet file.

Axis letters: N objects, D the vector's width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject, atomic_path
from difftap.errors import InputError, first_line, require

__all__ = ["SCHEMA", "PrototypeTable", "load_provenance", "save_stream"]

SCHEMA = 1
_KEY = b"difftap.prototypes"  # names our entry in the Parquet file's metadata
_ROWS = 4096
"""Rows of a row group, which is what a streaming reader holds at once."""

_COLUMNS: dict[str, tuple[str, type]] = {  # field -> column's name and numpy type, in the file's order
    "classes": ("class", np.str_),
    "images": ("image", np.str_),
    "instances": ("instance", np.str_),
    "areas": ("area", np.float32),
    "coverages": ("coverage", np.float32),
    "cells": ("cells", np.int32),
    "small": ("small", np.bool_),
    "taps": ("tap", np.str_),
    "timesteps": ("timestep", np.int32),
}


@dataclass(frozen=True, eq=False)
class PrototypeTable:
    """Prototypes of N objects, in the order in which they were built.

    Attributes:
        vectors: float32, ``(N, D)``, not normalised.
        classes: ``(N,)`` str, each object's class.
        images: ``(N,)`` str, the key of the image it was seen in.
        instances: ``(N,)`` str, the object's identity: the same in every image that shows the same object (the frames
            of a clip), different for any two objects.
        areas: ``(N,)`` float32, the mask's pixels as a fraction of the image's.
        coverages: ``(N,)`` float32, mean share of the kept cells that the mask covers, 0 to 1.
        cells: ``(N,)`` int32, how many cells were averaged.
        small: ``(N,)`` bool, whether the rule kept no cell, so that the cell which the mask covers most was used.
        taps: ``(N,)`` str, the tap, or taps joined by ``+``.
        timesteps: ``(N,)`` int32; -1 if the taps come from passes at several timesteps, which ``taps`` then names.
        provenance: ``recipe_key``, ``feature_key``, ``model_key``, ``difftap`` (its version), ``conditions``, and
            what the maker adds.
        boxes: ``(N, 4)`` int32, the tightest box around each mask: x0, y0, x1, y1 in pixels of the image, ends
            excluded; zeros if it is not known.

    Raises:
        InputError: an array has another shape, or the vectors are not float32.
    """

    vectors: NDArray[np.float32]
    classes: NDArray[np.str_]
    images: NDArray[np.str_]
    instances: NDArray[np.str_]
    areas: NDArray[np.float32]
    coverages: NDArray[np.float32]
    cells: NDArray[np.int32]
    small: NDArray[np.bool_]
    taps: NDArray[np.str_]
    timesteps: NDArray[np.int32]
    provenance: JsonObject = field(default_factory=dict)
    boxes: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 4), np.int32))

    def __post_init__(self) -> None:
        if not len(self.boxes):  # not given, or read from a table that was written before boxes were kept
            object.__setattr__(self, "boxes", np.zeros((len(self.vectors), 4), np.int32))
        if self.boxes.shape != (len(self.vectors), 4):
            raise InputError(f"boxes have shape {self.boxes.shape}; allowed: ({len(self.vectors)}, 4)")
        for name, (_, kind) in _COLUMNS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        if self.vectors.ndim != 2 or self.vectors.dtype != np.float32 or self.vectors.shape[1] < 1:
            raise InputError(f"prototypes are float32 (N, D), got {self.vectors.dtype} {self.vectors.shape}")
        lengths = {name: getattr(self, name).shape for name in _COLUMNS}
        odd = next((name for name, shape in lengths.items() if shape != (len(self.vectors),)), None)
        if odd is not None:
            raise InputError(f"{odd} has shape {lengths[odd]}; allowed: ({len(self.vectors)},), one entry a prototype")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D, the number of channels of a prototype."""
        return int(self.vectors.shape[1])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.integer] | slice) -> PrototypeTable:
        """Give the rows that a mask, a slice or row numbers choose, with the same provenance."""
        parts = {name: getattr(self, name)[rows] for name in ("vectors", "boxes", *_COLUMNS)}
        return dataclasses.replace(self, **parts)

    @classmethod
    def concat(cls, tables: Sequence[PrototypeTable]) -> PrototypeTable:
        """Join tables one after the other; the result has the first one's provenance.

        Raises:
            InputError: there is none, or their widths differ.
        """
        widths = sorted({table.width for table in tables})
        if len(widths) != 1:
            raise InputError(f"tables of width {widths or 'none'} cannot be joined; allowed: one or more of one width")
        parts = {name: np.concatenate([getattr(t, name) for t in tables]) for name in ("vectors", "boxes", *_COLUMNS)}
        return cls(**parts, provenance=tables[0].provenance)

    def save(self, path: str | Path) -> None:
        """Write one Parquet file, whole or not at all; the provenance goes into its metadata.

        Raises:
            OutputError: it cannot be written.
            MissingExtraError: pyarrow is not installed.
        """
        save_stream(Path(path), [self], self.width, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> PrototypeTable:
        """Read a Parquet file that `save` wrote.

        Raises:
            InputError: it is missing, damaged, no table of prototypes, or of another schema.
            MissingExtraError: pyarrow is not installed.
        """
        path = Path(path)
        arrow, parquet = _arrow()
        provenance = load_provenance(path)
        try:
            table = parquet.read_table(path, memory_map=False)
            vectors = table.column("vector").combine_chunks()
            width = vectors.type.list_size
            flat = vectors.flatten().to_numpy(zero_copy_only=False)
            rows: dict[str, Any] = {
                name: np.array(table.column(column).to_pylist(), np.str_)
                if kind is np.str_
                else table.column(column).to_numpy()
                for name, (column, kind) in _COLUMNS.items()
            }
            if "box" in table.column_names:
                boxes = table.column("box").combine_chunks().flatten().to_numpy(zero_copy_only=False)
                rows["boxes"] = boxes.astype(np.int32, copy=False).reshape(-1, 4)
            return cls(flat.astype(np.float32, copy=False).reshape(-1, width), **rows, provenance=provenance)
        except (arrow.ArrowException, OSError, KeyError, AttributeError, ValueError, TypeError) as error:
            raise InputError(
                f"'{path}' is no whole table of prototypes ({first_line(error)}); build it again with 'difftap "
                "prototypes build'"
            ) from error


def load_provenance(path: Path) -> JsonObject:
    """Read a table's provenance; only the end of the file is read.

    Raises:
        InputError: the file is missing, damaged, no table of prototypes, or of another schema.
    """
    arrow, parquet = _arrow()
    if not path.is_file():
        raise InputError(f"no table of prototypes at '{path}'; make one with 'difftap prototypes build'")
    try:
        data = json.loads((parquet.read_schema(path).metadata or {})[_KEY])
        schema, provenance = data["schema"], dict(data["provenance"])
    except (arrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"'{path}' is no table of prototypes ({first_line(error)}); give a file that 'difftap prototypes build' "
            "wrote"
        ) from error
    if schema != SCHEMA:
        raise InputError(f"'{path}' has schema {schema}; this difftap reads {SCHEMA}; build the table again")
    return provenance


def save_stream(path: Path, tables: Iterable[PrototypeTable], width: int, provenance: Mapping[str, object]) -> int:
    """Write tables one after the other into one Parquet file; hold only a few row groups in memory.

    The file's bytes depend on the rows and the provenance, not on how the rows were cut into tables.

    Args:
        path: the file.
        tables: the tables; their own provenance is not written.
        width: D, the width of their vectors.
        provenance: goes into the file's metadata.

    Returns:
        the number of rows written.

    Raises:
        OutputError: the file cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    text = json.dumps({"schema": SCHEMA, "provenance": dict(provenance)}, sort_keys=True, allow_nan=False)
    kinds = {np.str_: arrow.string(), np.float32: arrow.float32(), np.int32: arrow.int32(), np.bool_: arrow.bool_()}
    fields = [arrow.field(column, kinds[kind], nullable=False) for column, kind in _COLUMNS.values()]
    fields.append(arrow.field("box", arrow.list_(arrow.int32(), 4)))
    recipe_key = provenance.get("recipe_key")
    if recipe_key is not None:  # in every row too, for readers that see no metadata or join many tables
        fields.append(arrow.field("recipe_key", arrow.string(), nullable=False))
    fields.append(arrow.field("vector", arrow.list_(arrow.float32(), width)))
    schema = arrow.schema(fields, metadata={_KEY: text.encode()})
    rows = 0
    with (
        atomic_path(path) as scratch,
        parquet.ParquetWriter(
            scratch, schema, compression="zstd", use_dictionary=["class", "image", "tap", "recipe_key"]
        ) as writer,
    ):
        for table in _regrouped(tables):
            flat = arrow.array(np.ascontiguousarray(table.vectors).reshape(-1))
            columns = [arrow.array(getattr(table, name).tolist(), kinds[kind]) for name, (_, kind) in _COLUMNS.items()]
            corners = arrow.array(np.ascontiguousarray(table.boxes).reshape(-1))
            columns.append(arrow.FixedSizeListArray.from_arrays(corners, 4))
            if recipe_key is not None:
                columns.append(arrow.array([str(recipe_key)] * len(table), arrow.string()))
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, width))
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema), row_group_size=_ROWS)
            rows += len(table)
    return rows


def _regrouped(tables: Iterable[PrototypeTable]) -> Iterator[PrototypeTable]:
    """Yield the same rows in tables of `_ROWS`, the last one shorter."""
    held: list[PrototypeTable] = []
    count = 0
    for table in tables:
        held.append(table)
        count += len(table)
        while count >= _ROWS:
            joined = PrototypeTable.concat(held)
            yield joined.take(slice(0, _ROWS))
            held, count = [joined.take(slice(_ROWS, None))], count - _ROWS
    if count:
        yield PrototypeTable.concat(held)


def _arrow() -> tuple[ModuleType, ModuleType]:
    """Import pyarrow and its Parquet part."""
    why = "a table of prototypes"
    return require("pyarrow", "prototypes", why), require("pyarrow.parquet", "prototypes", why)
