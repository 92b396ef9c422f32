"""Images in a column of a table: Parquet files, or the Arrow files that Hugging Face's ``save_to_disk`` writes.

A cell is a file's bytes, a path, or the struct of both that Hugging Face calls an Image.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftap.errors import ImageError, InputError, first_line, require
from difftap.features.sources.items import Item, Source
from difftap.images import Image, decode_image, load_image

__all__ = ["CellAt", "parquet_source", "saved_dataset"]

_KEPT = 4  # pieces of tables that stay in memory: row groups, or mapped files
_pieces: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class CellAt:
    """An image in a cell: file, row group (-1: the whole of an Arrow file), row in it, column."""

    path: str
    group: int
    row: int
    column: str

    def load(self) -> Image:
        """Read and decode the cell."""
        where = f"{self.path}:{self.row}" if self.group < 0 else f"{self.path}:{self.group}.{self.row}"
        try:
            cell = _piece(self.path, self.group, self.column)[self.row].as_py()
        except Exception as error:  # pyarrow's kinds, of damaged files
            raise ImageError(f"'{where}' cannot be read ({first_line(error)})") from error
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, str):
            data, name = None, data
        if data is not None:
            return decode_image(data, where)
        if not name:
            raise ImageError(f"'{where}' holds no image: the cell is empty")
        return load_image(Path(self.path).parent / name)


def _piece(path: str, group: int, column: str) -> Any:
    """A column of one row group, or of a whole Arrow file, which is mapped and not read."""
    name = (path, group, column)
    with _lock:  # several threads want the next group at once, and one of them is to read it
        if name not in _pieces:
            if group < 0:
                import pyarrow as pa

                table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
            else:
                import pyarrow.parquet

                with pyarrow.parquet.ParquetFile(path) as file:
                    table = file.read_row_group(group, columns=[column])
            _pieces[name] = table.column(column)
            while len(_pieces) > _KEPT:
                _pieces.popitem(last=False)
        _pieces.move_to_end(name)
        return _pieces[name]


def _choose(schema: Any, column: str | None, path: Path) -> str:
    """The column with the images: the one asked for, or the first that looks like one."""
    import pyarrow as pa

    def fits(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if column is not None:
        kind = schema.field(column).type if column in schema.names else None
        if kind is not None and (fits(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return column
        got = "there is none" if kind is None else f"it is of type {kind}"
        raise InputError(
            f"column '{column}' of '{path}' cannot hold images ({got}); columns: {', '.join(schema.names)}; allowed: "
            "bytes, a path, or a struct of both"
        )
    for field in schema:
        if fits(field.type):
            return str(field.name)
    raise InputError(
        f"no column of '{path}' looks like images; columns: {', '.join(schema.names)}; name one with --column"
    )


def parquet_source(paths: Sequence[Path], root: Path, column: str | None) -> Source:
    """The images in a column of Parquet files.

    Raises:
        InputError: a file cannot be read, or has no such column.
    """
    require("pyarrow", "store", "a table of images")
    import pyarrow.parquet

    items = []
    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except Exception as error:
            raise InputError(f"'{path}' cannot be read as Parquet ({first_line(error)})") from error
        with file:
            name = _choose(file.schema_arrow, column, path)
            key, row = path.relative_to(root).as_posix(), 0
            for group in range(file.metadata.num_row_groups):
                for place in range(file.metadata.row_group(group).num_rows):
                    items.append(Item(f"{key}:{row}", CellAt(str(path), group, place, name)))
                    row += 1
    return Source.unique("a table of images (Parquet)", items)


def saved_dataset(folder: Path, column: str | None) -> Source:
    """The images in a column of a data set that Hugging Face's ``save_to_disk`` wrote.

    Raises:
        InputError: it is a dictionary of splits, has its rows picked by an index, or is damaged.
    """
    require("pyarrow", "store", "a data set's column")
    import pyarrow as pa

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file())
        raise InputError(f"'{folder}' holds the splits {', '.join(splits)}; give one of these folders")
    items = []
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):  # of old versions; newer ones lay the rows out
            raise InputError(f"'{folder}' has its rows picked by an index; save it anew after flatten_indices()")
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        for path in files:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            name = _choose(table.schema, column, path)
            items += [Item(f"{path.name}:{row}", CellAt(str(path), -1, row, name)) for row in range(len(table))]
    except InputError:
        raise
    except Exception as error:  # JSON's, pyarrow's and the file system's kinds
        raise InputError(f"'{folder}' cannot be read as a saved data set ({first_line(error)})") from error
    return Source.unique("a table of images (Arrow)", items)
