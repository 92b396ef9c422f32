"""Data sets of objects: `load` takes a name and a folder and gives scenes, images with the masks of their objects.

Each data set is one module with ``load(root, *, split, listing, wanted, allow_missing, ...)``, the ``TREE`` of files
that it expects, and ``variants(root)``, the splits that the folder holds. A module is imported when it is first used.
Axis letters: K objects; H W image pixels.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from difftap.datasets.layout import DatasetError, Problem, Tree, load_with
from difftap.errors import InputError
from difftap.images import Image

__all__ = [
    "NAMES",
    "Mask",
    "ObjectFilter",
    "ObjectLoader",
    "Scene",
    "SceneObject",
    "SceneSource",
    "load",
    "loader",
    "make_scene",
    "make_source",
    "mask_boxes",
    "read_listing",
    "read_names",
]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        instance: its identity, the same in every scene that shows the same object.
        category: its class.
        area: pixels of its mask as a fraction of the image's pixels.
    """

    instance: str
    category: str
    area: float


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and the wanted objects in it.

    Attributes:
        key: the image's name in its data set.
        image: the picture.
        objects: K objects.
        masks: bool, ``(K, H, W)``.
        left_out: how many objects are annotated but not wanted, by reason.
    """

    key: str
    image: Image
    objects: tuple[SceneObject, ...]
    masks: Mask
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width, height = self.image.size
        if self.masks.shape != (len(self.objects), height, width) or self.masks.dtype != np.bool_:
            raise InputError(
                f"masks of '{self.key}' are {self.masks.dtype} {self.masks.shape}; allowed: bool "
                f"({len(self.objects)}, {height}, {width}), one per object, as large as the image"
            )


@dataclass(frozen=True)
class ObjectFilter:
    """Which objects are wanted.

    Attributes:
        min_area: an object must cover more than this fraction of the image (the study: 0.01).
        classes: the classes wanted; None for all.

    Raises:
        InputError: ``min_area`` is below 0, or 1 or more.
    """

    min_area: float = 0.01
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < 1:
            raise InputError(f"min-area is {self.min_area}; allowed: a fraction of the image, 0 to below 1")

    def to_dict(self) -> dict[str, object]:
        """Give plain data, for provenance."""
        return {"min_area": self.min_area, "classes": None if self.classes is None else sorted(self.classes)}


@dataclass(frozen=True)
class SceneSource:
    """Scenes that are read one at a time.

    Attributes:
        name: name of the data set.
        keys: the scenes' names, in order.
        read: gives a scene by its name; raises InputError if it cannot be used.
        about: what decides the scenes, as plain data; it enters the provenance of everything made from them.
        missing: images that are listed but not there: name, kind of problem, what is wrong.
        unused: what the data set's files hold and no scene uses, in words.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[str], Scene]
    about: Mapping[str, object]
    missing: tuple[tuple[str, str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def mask_boxes(masks: Mask) -> NDArray[np.int32]:
    """Find the tightest box around each mask.

    Args:
        masks: bool, ``(K, H, W)``.

    Returns:
        int32 ``(K, 4)``: x0, y0, x1, y1 in pixels, ends excluded; zeros for an empty mask.
    """
    found = np.zeros((len(masks), 4), np.int32)
    for box, mask in zip(found, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


def make_scene(
    key: str,
    image: Image,
    found: Sequence[tuple[str, str, Mask]],
    wanted: ObjectFilter,
    left_out: Mapping[str, int] | None = None,
) -> Scene:
    """Make a scene of the wanted objects, and count the others.

    Args:
        key: the scene's name.
        image: the picture.
        found: identity, class and mask ``(H, W)`` of each annotated object.
        wanted: which objects to keep.
        left_out: number of objects that the caller has left out already, by reason.
    """
    counts = dict(left_out or {})
    objects, masks = [], []
    pixels = image.size[0] * image.size[1]
    for instance, category, mask in found:
        area = float(np.count_nonzero(mask)) / pixels
        reason = None
        if wanted.classes is not None and category not in wanted.classes:
            reason = "class not wanted"
        elif area == 0:
            reason = "empty mask"
        elif area <= wanted.min_area:
            reason = "too small an area"
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
            continue
        objects.append(SceneObject(instance, category, area))
        masks.append(mask)
    height, width = image.pixels.shape[:2]
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.bool_)
    return Scene(key, image, tuple(objects), stacked, counts)


# ---- lists of images, and images that are missing

_SHOWN = 10  # problems that an error lists; ``data check`` lists all
_ALIASES = {"pascal": "voc"}  # the study's list calls VOC so


def read_names(path: Path) -> list[str]:
    """Read the first word of each line of a list; in the data sets' own lists, a label may follow it.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"'{path}' cannot be read ({error}); restore it") from error
    return [line.split()[0] for line in lines if line.strip()]


def read_listing(path: Path, dataset: str) -> tuple[str, ...]:
    """Read the names of the images or clips to take from one data set.

    The study's list is a CSV file for several data sets, with the columns ``src,dataset``. A file without these
    columns is read as a plain list with one name on each line.

    Raises:
        InputError: it cannot be read, or names nothing of this data set.
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


def make_source(
    name: str,
    root: Path,
    keys: Sequence[str],
    read: Callable[[str], Scene],
    about: Mapping[str, object],
    missing: Sequence[Problem],
    *,
    allow_missing: bool,
    unused: Sequence[str] = (),
) -> SceneSource:
    """Make a source of the scenes that are there. Images that are missing are counted, if that is allowed.

    Raises:
        DatasetError: nothing is listed, nothing is left, or images are missing and ``allow_missing`` is not set.
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
    return SceneSource(name, tuple(keys), read, {**about, "missing": len(left)}, left, tuple(unused))


# ---- the data sets

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
        wanted: ObjectFilter = ...,
        allow_missing: bool = ...,
        **options: object,
    ) -> SceneSource:
        """Return the scenes of a split, or those that a list names."""

    def variants(self, root: Path) -> list[str]:
        """Return the splits that the folder holds."""


def loader(name: str) -> ObjectLoader:
    """Import the module that reads a data set.

    Raises:
        InputError: there is no data set of that name.
    """
    if name not in _MODULES:
        raise InputError(f"no data set of objects '{name}'; allowed: {', '.join(NAMES)}")
    return cast(ObjectLoader, importlib.import_module(_MODULES[name]))


def load(name: str, root: str | Path, **options: object) -> SceneSource:
    """Open a data set of objects. Its scenes are read one by one, when they are used.

    Args:
        name: one of `NAMES`.
        root: the folder it lies in.
        options: ``split``, ``listing`` (names of images or clips), ``wanted`` (an `ObjectFilter`), ``allow_missing``,
            and further options of the data set's own ``load``.

    Raises:
        DatasetError: the folder is not laid out as expected, or images are missing and ``allow_missing`` is not set.
        InputError: an option is not one of those allowed.
    """
    return load_with(name, loader(name).load, Path(root), options)
