"""Open the scenes of a data set with objects chosen by class, size and list, for commands and the study."""

from __future__ import annotations

from pathlib import Path

from difftap.datasets import coco, voc
from difftap.datasets.objects import ObjectFilter, SceneSource, load, read_listing
from difftap.errors import InputError

__all__ = ["classes_of", "open_objects"]


def classes_of(text: str | None, dataset: str) -> tuple[str, ...] | None:
    """Split a text such as ``person,car`` into class names. ``voc`` gives VOC's 20 classes as this data set names them.

    Returns:
        the names; None for None, which means all classes.

    Raises:
        InputError: the text names no class.
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
        split: the split, by the data set's own name for it; None for the first that is there.
        listing: a file that names the images or clips to take; no others are taken.
        classes: as `classes_of` reads them; None for all.
        min_area: an object must cover more than this fraction of the image.
        crowds: COCO's crowd annotations: ``exclude`` or ``include``.
        allow_missing: leave out listed images that are missing, and count them.

    Raises:
        InputError: the folder is not laid out as expected, or there is no such split or class.
    """
    wanted = ObjectFilter(min_area, classes_of(classes, dataset))
    options: dict[str, object] = {"split": split, "wanted": wanted, "allow_missing": allow_missing}
    if listing is not None:
        options["listing"] = read_listing(listing, dataset)
    # The default is left out for other data sets, whose loaders refuse an option that they do not have.
    if dataset == "coco" or crowds != "exclude":
        options["crowds"] = crowds
    return load(dataset, root, **options)
