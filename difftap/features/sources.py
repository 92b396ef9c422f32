"""Where a data set's images come from: a folder, a list, a glob, tar files, Parquet or Arrow columns.

A source lists its items once, in an order that does not change; an item is small, knows its key, and loads its image by
itself, in any thread, process or machine that sees the files.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from difftap.artifacts.memory import MemoryCache
from difftap.errors import ImageError, InputError, first_line, require
from difftap.images import PICTURE_ENDINGS, FolderScan, Image, decode_image, is_picture, load_image, walk_folder

__all__ = [
    "CellAt",
    "FileAt",
    "Item",
    "Locator",
    "MemberAt",
    "Source",
    "open_source",
    "parquet_source",
    "saved_dataset",
    "tar_source",
]


class Locator(Protocol):
    """Says where one image lies."""

    def load(self) -> Image:
        """Read and decode it.

        Raises:
            ImageError: it cannot be used.
        """


@dataclass(frozen=True)
class Item:
    """One image of a data set: its key there, and where it lies."""

    key: str
    at: Locator


@dataclass(frozen=True)
class Source:
    """A data set's images, listed.

    Attributes:
        kind: what it is, for people.
        items: one an image, keys unique.
        repeated: how many entries were left out because an earlier one has their key.
        left_out: what else lies there and is not taken, in words.
    """

    kind: str
    items: Sequence[Item]
    repeated: int = 0
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @classmethod
    def unique(cls, kind: str, items: Sequence[Item], left_out: str = "") -> Source:
        """Make a source of the items, each key once."""
        kept = {item.key: item for item in reversed(items)}
        first = [item for item in items if kept[item.key] is item]
        return cls(kind, first, len(items) - len(first), left_out)


@dataclass(frozen=True)
class FileAt:
    """An image in a file of its own."""

    path: str

    def load(self) -> Image:
        """Read and decode the file."""
        return load_image(self.path)


@dataclass(frozen=True)
class MemberAt:
    """An image inside a tar file that is not compressed."""

    archive: str
    name: str
    offset: int
    size: int

    def load(self) -> Image:
        """Read and decode the member."""
        where = f"{self.archive}:{self.name}"
        try:
            with open(self.archive, "rb") as handle:
                handle.seek(self.offset)
                data = handle.read(self.size)
        except OSError as error:
            raise ImageError(f"'{where}' cannot be read ({error.strerror or error})") from error
        if len(data) < self.size:
            raise ImageError(f"'{where}' is cut short: {len(data)} of {self.size} bytes; the archive is damaged")
        return decode_image(data, str(Path(where)))


# ---- tar files, as WebDataset writes them: found by one pass over the headers, then read in any order


def tar_source(paths: Sequence[Path]) -> Source:
    """List the images in one or more tar files.

    Raises:
        InputError: one cannot be read, or is compressed.
    """
    items = []
    for path in paths:
        prefix = f"{path.name}/" if len(paths) > 1 else ""
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isreg() and is_picture(member.name):
                        at = MemberAt(str(path), member.name, member.offset_data, member.size)
                        items.append(Item(prefix + member.name, at))
                    archive.members = []  # type: ignore[attr-defined]  # or it would remember every header
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"'{path}' cannot be read as an uncompressed tar file ({error})") from error
    return Source.unique("tar files" if len(paths) > 1 else "a tar file", items)


# ---- tables: Parquet files, or the Arrow files that Hugging Face's ``save_to_disk`` writes. A cell is a file's
# bytes, a path, or the struct of both that Hugging Face calls an Image.


@dataclass(frozen=True)
class _Piece:
    """A column of one row group, or of a mapped file."""

    column: Any
    mapped: bool


PIECES_KEPT = 512 << 20
"""Bytes of row groups that stay in memory; two stay whatever they take, since one may end in the middle of a batch."""
# A mapped file costs an open file but no memory of its own, since the kernel takes its pages back: it counts little.
_pieces: MemoryCache[tuple[str, int, str], _Piece] = MemoryCache(
    PIECES_KEPT, lambda piece: 8 << 20 if piece.mapped else piece.column.nbytes
)
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
    """Read a column of one row group, or of a whole Arrow file, which is mapped and not read."""
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
            _pieces.put(name, _Piece(table.column(column), mapped=group < 0))
        _pieces.touch(name)
        return _pieces[name].column


def _choose(schema: Any, column: str | None, path: Path) -> str:
    """Choose the column with the images: the one asked for, or the first that looks like one."""
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
    """List the images in a column of Parquet files.

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
    """List the images in a column of a data set that Hugging Face's ``save_to_disk`` wrote.

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


# ---- from what the user gave to a source

_LISTS = (".txt", ".lst", ".list")
_KINDS = (
    "a folder of images, a glob such as 'photos/**/*.jpg' (quoted), a list of paths (.txt), tar files (.tar), or a "
    "data set's column (.parquet, or a folder that datasets.save_to_disk wrote)"
)


def open_source(text: str | Path, column: str | None = None) -> Source:
    """List the images that a path, or a glob in quotes, stands for.

    A folder with images in it gives those, at any depth; one without, its tar or Parquet files. Keys are: of a folder,
    paths relative to it; of a glob, relative to its part without wildcards; of a list, its lines as they are; of a
    tar, member names; of several tars, with the archive's name in front; of a table, ``file:row``.

    Args:
        text: what was given.
        column: of a table, the column with the images; None for the first that looks like one.

    Raises:
        InputError: there is nothing, or nothing that can be used.
        MissingExtraError: a table needs pyarrow.
    """
    text = os.fspath(text)
    path = Path(text)
    source = None
    try:
        if path.is_dir():
            source = _folder(path, column)
        elif path.is_file():
            source = _file(path, column)
    except OSError as error:
        raise InputError(f"'{text}' cannot be read ({error.strerror or error})") from error
    if source is None and any(mark in text for mark in "*?["):
        source = _glob(text, column)
    if source is None:
        raise InputError(f"no images at '{text}'; give {_KINDS}")
    if column is not None and "table" not in source.kind:
        raise InputError(f"--column goes with a table of images; '{text}' is {source.kind}")
    if not source.items:
        raise InputError(
            f"no image in '{text}' ({source.kind}); allowed: {', '.join(PICTURE_ENDINGS)}; or give {_KINDS}"
        )
    return source


def _folder(path: Path, column: str | None) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return saved_dataset(path, column)
    found = FolderScan.of(path)
    if found.pictures:
        items = [Item(file.relative_to(path).as_posix(), FileAt(str(file))) for file in found.pictures]
        return Source.unique("a folder of images", items, found.left_out)
    return _containers(list(walk_folder(path)), path, column) or Source("a folder", [])


def _containers(files: list[Path], root: Path, column: str | None) -> Source | None:
    """List the images in tar or Parquet files; None if there are none of those."""
    archives = [file for file in files if file.suffix.lower() == ".tar"]
    if archives:
        return tar_source(archives)
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables:
        return parquet_source(tables, root, column)
    return None


def _file(path: Path, column: str | None) -> Source:
    name = path.name.lower()
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise InputError(f"'{path}' is a compressed archive, which has no random access; unpack it to a .tar first")
    found = _containers([path], path.parent, column)
    if found is not None:
        return found
    if name.endswith(_LISTS):
        return _list(path)
    if is_picture(name):
        return Source("one image", [Item(path.name, FileAt(str(path)))])
    raise InputError(f"'{path}' is no kind of source that is known; give {_KINDS}")


def _list(path: Path) -> Source:
    """Read a list of paths, one a line, relative to the list's folder; skip empty lines and those with # first."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list '{path}' cannot be read ({error}); give a text file of paths, one a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return Source.unique("a list of images", [Item(key, FileAt(str(path.parent / key))) for key in keys])


def _glob(pattern: str, column: str | None) -> Source | None:
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    root = Path(*parts[:fixed]) if fixed else Path()
    found_paths = glob.glob(pattern, recursive=True)  # noqa: PTH207 - a pattern may be absolute
    files = sorted(Path(one) for one in found_paths if Path(one).is_file())
    found = _containers(files, root, column)
    if found is not None or not files:
        return found
    items = [Item(file.relative_to(root).as_posix(), FileAt(str(file))) for file in files]
    images = [item for item in items if is_picture(item.key)]
    others = f"{len(items) - len(images)} files that are no pictures" if len(items) > len(images) else ""
    return Source.unique("a glob of images", images, others)
