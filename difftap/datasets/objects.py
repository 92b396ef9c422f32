"""Data sets of objects: a name, a folder, and out comes a `difftap.prototypes.Source` of scenes with masks.

Every loader is one module with ``load(root, *, split, listing, wanted, allow_missing, ...)``, the ``TREE`` of files it
expects and ``variants(root)``, the splits that the folder holds. They are imported on use.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.datasets.layout import Tree
    from difftap.datasets.scenes import Selection, Source

__all__ = ["NAMES", "ObjectLoader", "load", "loader"]

_MODULES = {
    "coco": "difftap.datasets.coco",
    "davis": "difftap.datasets.davis",
    "folder": "difftap.datasets.folder",
    "voc": "difftap.datasets.voc",
}

NAMES = tuple(_MODULES)
"""The data sets' names, as `load` and the command line take them."""


class ObjectLoader(Protocol):
    """What a loader's module offers."""

    TREE: Tree

    def load(
        self,
        root: Path,
        *,
        split: str | None = ...,
        listing: Sequence[str] | None = ...,
        wanted: Selection = ...,
        allow_missing: bool = ...,
        **options: Any,
    ) -> Source:
        """The scenes of a split, or those that a list names."""

    def variants(self, root: Path) -> list[str]:
        """The splits that the folder holds."""


def loader(name: str) -> ObjectLoader:
    """The module that reads a data set.

    Raises:
        InputError: there is no data set of that name.
    """
    if name not in _MODULES:
        raise InputError(f"no data set of objects '{name}'; allowed: {', '.join(NAMES)}")
    return cast(ObjectLoader, importlib.import_module(_MODULES[name]))


def load(name: str, root: str | Path, **options: Any) -> Source:
    """Open a data set of objects; scenes are read when they are asked for.

    Args:
        name: one of `NAMES`.
        root: the folder it lies in.
        options: ``split``, ``listing`` (names of images or clips), ``wanted`` (a `Selection`), ``allow_missing``, and
            what the data set's own ``load`` takes beyond these.

    Raises:
        DatasetError: the folder is not laid out as expected, or images are missing and ``allow_missing`` is not set.
        InputError: an option is not one of those allowed.
    """
    module = loader(name)
    unknown = set(options) - set(inspect.signature(module.load).parameters)
    if unknown:
        raise InputError(f"data set '{name}' has no option --{min(unknown)}; leave it out")
    return module.load(Path(root), **options)
