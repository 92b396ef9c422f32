"""What the loaders of objects share: masks in label files, lists of images, images that are missing."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftap.datasets.layout import DatasetError, Problem
from difftap.datasets.scenes import Scene, Source
from difftap.errors import InputError

__all__ = ["VOID", "open_source", "read_listing", "read_names"]

VOID = 255
"""The label of pixels that belong to nothing: VOC's object borders and what was too hard to label."""

_SHOWN = 10
_ALIASES = {"pascal": "voc"}


def read_names(path: Path) -> list[str]:
    """The first word of each line of a list, as the data sets' own splits have them.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"'{path}' cannot be read ({error}); restore it") from error
    return [line.split()[0] for line in lines if line.strip()]


def read_listing(path: Path, dataset: str) -> tuple[str, ...]:
    """The images or clips of one data set in a list like the study's, a CSV with the columns ``src,dataset``.

    A file without these columns is a plain list, one name a line.

    Raises:
        InputError: it cannot be read, or names nothing for this data set.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle) if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' cannot be read as a list of images ({error})") from error
    if rows and {"src", "dataset"} <= set(rows[0]):
        source, owner = rows[0].index("src"), rows[0].index("dataset")
        short = next((k for k, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if short is not None:
            raise InputError(f"line {short + 1} of '{path}' has {len(rows[short])} cells; allowed: {len(rows[0])}")
        names = [row[source] for row in rows[1:] if _ALIASES.get(row[owner], row[owner]) == dataset]
    else:
        names = [row[0] for row in rows]
    if not names:
        raise InputError(f"'{path}' names nothing of the data set '{dataset}'; give a list that does, or none")
    return tuple(dict.fromkeys(names))


def open_source(
    name: str,
    root: Path,
    keys: Sequence[str],
    read: Callable[[str], Scene],
    about: Mapping[str, Any],
    missing: Sequence[Problem],
    *,
    allow_missing: bool,
) -> Source:
    """The scenes that are there; the listed ones that are not are refused, or counted.

    Raises:
        DatasetError: nothing is listed, or something is missing and may not be.
    """
    if missing and not (allow_missing and keys):
        lines = [f"{problem.pair}: {problem.message}" for problem in missing[:_SHOWN]]
        more = [f"... and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        mend = "mend them, or allow missing images" if keys else "none is left to use"
        raise DatasetError(
            f"{len(missing)} of {len(missing) + len(keys)} images of '{name}' in '{root}' cannot be used; {mend} "
            f"('difftap data check {name} {root}' lists what is broken)",
            "\n".join([*lines, *more]),
            tuple(missing),
        )
    if not keys:
        raise DatasetError(f"'{name}' in '{root}' lists no images; restore its list")
    left = tuple((problem.pair, problem.kind, problem.message) for problem in missing)
    return Source(name, tuple(keys), read, {**about, "missing": len(left)}, left)
