"""A data set's folder: the files expected in it, how listed files are found, and the errors about both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from numpy.typing import ArrayLike

from difftap.errors import InputError, require

__all__ = [
    "BadPairError",
    "DatasetError",
    "Problem",
    "Tree",
    "draw_tree",
    "load_with",
    "locate",
    "one_of",
    "read_mat",
    "require_files",
]

T = TypeVar("T")

Tree = tuple[tuple[str, str], ...]
"""Files that a data set consists of: a glob pattern under its root, and what it is."""


@dataclass(frozen=True)
class Problem:
    """A pair that was listed but left out.

    Attributes:
        kind: ``missing-image``, ``unreadable-image``, ``missing-annotation``, ``malformed``, ``size-mismatch`` or
            ``no-keypoints``.
        pair: the pair's name, or the list and line it was read from.
        message: what is wrong, in words.
        path: the file that causes it, if there is one.
    """

    kind: str
    pair: str
    message: str
    path: Path | None = None


class DatasetError(InputError):
    """A data set's folder cannot be used.

    Attributes:
        summary: one line: what is wrong, what was found, what is allowed, and how to mend it.
        detail: further lines: the expected files, or the list of what is broken. ``str(error)`` gives both.
        problems: the broken pairs, if they are the reason.
    """

    def __init__(self, summary: str, detail: str = "", problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(f"{summary}\n{detail}" if detail else summary)
        self.summary = summary
        self.detail = detail
        self.problems = problems


class BadPairError(InputError):
    """A pair cannot be used; the collector turns this error into a `Problem`."""

    def __init__(self, kind: str, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.path = path


def one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Check that a value is allowed.

    Raises:
        InputError: it is not.
    """
    if value not in allowed:
        raise InputError(f"{what} '{value}' does not exist; allowed: {', '.join(allowed)}")


def draw_tree(root: Path, tree: Tree) -> str:
    """Draw the expected files below a folder, one on each line, and mark those that are not there."""
    width = max(len(pattern) for pattern, _ in tree)
    lines = [f"expected:\n{root}/"]
    for pattern, meaning in tree:
        there = root.is_dir() and next(root.glob(pattern), None) is not None
        lines.append(f"|-- {pattern:<{width}}  {meaning}" + ("" if there else "  [not found]"))
    return "\n".join([*lines[:-1], "`" + lines[-1][1:]])


def load_with(name: str, load: Callable[..., T], root: Path, options: Mapping[str, object]) -> T:
    """Call a data set's ``load`` with options from the command line.

    Raises:
        InputError: this data set's ``load`` has no such option.
    """
    unknown = set(options) - set(inspect.signature(load).parameters)
    if unknown:
        raise InputError(f"data set '{name}' has no option --{min(unknown)}; leave it out")
    return load(root, **options)


def require_files(name: str, root: Path, tree: Tree, *wanted: Path) -> None:
    """Check that a data set's folder exists and has the files wanted.

    Raises:
        DatasetError: it does not; the error draws the expected files.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DatasetError(f"'{root}' {what}; give the folder that holds the data set '{name}'", draw_tree(root, tree))
    for path in wanted:
        if not path.exists():
            place = path.relative_to(root) if path.is_relative_to(root) else path
            raise DatasetError(
                f"the data set '{name}' in '{root}' lacks '{place}'; complete it, or give the folder that holds it",
                draw_tree(root, tree),
            )


def locate(root: Path, relative: str) -> Path:
    """Find the file that a list names, also if ``root`` is itself one of the folders in that name.

    Leading folders of the name are dropped until the file exists. If it never does, the full name below ``root`` is
    given, for the error.

    Raises:
        BadPairError: the name is empty or leaves the folder (``..``).
    """
    parts = [part for part in PurePosixPath(relative.strip().replace("\\", "/")).parts if part != "/"]
    if not parts or ".." in parts:
        raise BadPairError("malformed", f"'{relative}' is not the name of a file inside the data set")
    candidates = (root.joinpath(*parts[skip:]) for skip in range(len(parts)))
    return next((path for path in candidates if path.exists()), root.joinpath(*parts))


def read_mat(path: Path) -> dict[str, ArrayLike]:
    """Read the variables of a MATLAB 5 to 7 file, by name; those of PF-WILLOW and PF-PASCAL are numeric arrays.

    Raises:
        MissingExtraError: scipy is not installed.
        ValueError: the file is damaged, or has the HDF5 format of MATLAB 7.3.
    """
    scipy_io = require("scipy.io", "bench", "reading .mat annotations")
    try:
        content: dict[str, ArrayLike] = scipy_io.loadmat(path)
    except Exception as error:  # on a damaged file, scipy's parser raises errors of many kinds
        raise ValueError(f"not a MATLAB 5 to 7 file: {error}") from error
    return content
