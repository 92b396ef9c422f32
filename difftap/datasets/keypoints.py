"""Point-matching data sets: a name, a folder, and out come `difftap.datasets.samples.Sample`s.

Every loader is one module with ``load(root, *, split, allow_missing, cache, ...)``, the ``TREE`` of files it expects
and ``variants(root)``, the sets of options for which the folder holds a list of pairs. They are imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from difftap.errors import InputError

if TYPE_CHECKING:
    from difftap.datasets.collect import Dataset
    from difftap.datasets.layout import Tree

__all__ = ["NAMES", "Loader", "load", "loader"]

_MODULES = {
    "pf-pascal": "difftap.datasets.pf_pascal",
    "pf-willow": "difftap.datasets.pf_willow",
    "spair": "difftap.datasets.spair",
    "synthetic": "difftap.datasets.synthetic",
}

NAMES = tuple(_MODULES)
"""The data sets' names, as `load` and the command line take them."""


class Loader(Protocol):
    """What a loader's module offers."""

    TREE: Tree
    SPLITS: tuple[str, ...]

    def load(
        self, root: Path, *, split: str = ..., allow_missing: bool = ..., cache: Path | None = ..., **options: Any
    ) -> Dataset:
        """Read the pairs of one split."""

    def variants(self, root: Path) -> Iterator[dict[str, Any]]:
        """The options of `load` for which the folder holds a list of pairs."""


def loader(name: str) -> Loader:
    """The module that reads a data set.

    Raises:
        InputError: there is no data set of that name.
    """
    if name not in _MODULES:
        raise InputError(f"no data set '{name}'; allowed: {', '.join(NAMES)}")
    return cast(Loader, importlib.import_module(_MODULES[name]))


def load(name: str, root: str | Path, **options: Any) -> Dataset:
    """Read a data set's pairs.

    Args:
        name: one of `NAMES`.
        root: the folder it lies in.
        options: ``split``, ``allow_missing``, ``cache``, and what the data set's own ``load`` takes beyond these.

    Raises:
        DatasetError: the folder is not laid out as expected, or pairs are broken and ``allow_missing`` is not set.
        InputError: an option is not one of those allowed.
    """
    return loader(name).load(Path(root), **options)
