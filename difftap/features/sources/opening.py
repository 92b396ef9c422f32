"""From what the user gave to a source."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from difftap.errors import InputError
from difftap.features.sources.items import FileAt, Item, Source
from difftap.images import PICTURE_ENDINGS, is_picture, walk_folder

__all__ = ["open_source"]

_LISTS = (".txt", ".lst", ".list")
_KINDS = (
    "a folder of images, a glob such as 'photos/**/*.jpg' (quoted), a list of paths (.txt), tar files (.tar), or a "
    "data set's column (.parquet, or a folder that datasets.save_to_disk wrote)"
)


def open_source(text: str | Path, column: str | None = None) -> Source:
    """The images that a path, or a glob in quotes, stands for.

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
        from difftap.features.sources.tables import saved_dataset

        return saved_dataset(path, column)
    files = list(walk_folder(path))
    images = [file for file in files if is_picture(file)]
    if images:
        items = [Item(file.relative_to(path).as_posix(), FileAt(str(file))) for file in sorted(images)]
        return Source.unique("a folder of images", items)
    return _containers(files, path, column) or Source("a folder", [])


def _containers(files: list[Path], root: Path, column: str | None) -> Source | None:
    """The images in tar or Parquet files; None if there are none of those."""
    archives = [file for file in files if file.suffix.lower() == ".tar"]
    if archives:
        from difftap.features.sources.tar import tar_source

        return tar_source(archives)
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables:
        from difftap.features.sources.tables import parquet_source

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
    """A list of paths, one a line, relative to the list's folder; empty lines and those that begin with # count not."""
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
    return Source.unique("a glob of images", images)
