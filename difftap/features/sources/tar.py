"""Images in tar files, as WebDataset writes them: found by one pass over the headers, then read in any order."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from difftap.errors import InputError
from difftap.features.sources.items import Item, MemberAt, Source
from difftap.images import is_picture

__all__ = ["tar_source"]


def tar_source(paths: Sequence[Path]) -> Source:
    """The images in one or more tar files.

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
