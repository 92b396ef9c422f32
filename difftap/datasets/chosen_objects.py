"""Objects chosen from a data set by class, size and list: what commands and the study open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftap.datasets import coco, voc
from difftap.datasets.objects import ObjectFilter, SceneSource, load, read_listing
from difftap.errors import InputError

__all__ = ["classes_of", "open_objects"]


def classes_of(text: str | None, dataset: str) -> tuple[str, ...] | None:
    """List the classes that a text names, with commas between; ``voc`` stands for VOC's 20 in the data set's own words.

    Raises:
        InputError: it names none.
    """
    if text is None:
        return None
    if text == "voc":
        return tuple(coco.VOC_NAMES.get(one, one) for one in voc.CLASSES) if dataset == "coco" else voc.CLASSES
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise InputError(f"--classes is {text!r}; allowed: names with commas between, such as person,car, or voc")
    return names


def open_objects(
    dataset: str,
    root: Path,
    split: str | None = None,
    listing: Path | None = None,
    classes: str | None = None,
    min_area: float = 0.01,
    crowds: str = "exclude",
    allow_missing: bool = False,
) -> SceneSource:
    """Open the scenes of a data set that hold wanted objects.

    Args:
        dataset: its name; one of `difftap.datasets.objects.NAMES`.
        root: its folder.
        split: the data set's own name of it; None for the first that is there.
        listing: a file that names the only images or clips to take.
        classes: as `classes_of` reads them; None for all.
        min_area: least area of an object, as a fraction of the image.
        crowds: COCO's: ``exclude`` or ``include``.
        allow_missing: leave out listed images that are missing, and count them.

    Raises:
        InputError: the folder is not laid out as expected, or there is no such split or class.
    """
    wanted = ObjectFilter(min_area, classes_of(classes, dataset))
    options: dict[str, Any] = {"split": split, "wanted": wanted, "allow_missing": allow_missing}
    if listing is not None:
        options["listing"] = read_listing(listing, dataset)
    if dataset == "coco" or crowds != "exclude":
        options["crowds"] = crowds
    return load(dataset, root, **options)
