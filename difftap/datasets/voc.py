"""PASCAL VOC 2012 instances: per image, one palette PNG that numbers the objects and one that numbers the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from difftap.datasets.layout import DatasetError, Problem, Tree, draw_tree, one_of, require_files
from difftap.datasets.objects import ObjectFilter, Scene, SceneSource, make_scene, make_source, read_names
from difftap.errors import InputError
from difftap.images import VOID, load_image, read_labels

__all__ = ["CLASSES", "SPLITS", "TREE", "load", "variants"]

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes in the order of their labels, 1 to 20."""

SPLITS = ("trainval", "train", "val")
TREE: Tree = (
    ("ImageSets/Segmentation/*.txt", "lists of images: train.txt, val.txt, trainval.txt"),
    ("JPEGImages/*.jpg", "the images"),
    ("SegmentationClass/*.png", "palette PNGs, the class of each pixel; 255 is void"),
    ("SegmentationObject/*.png", "palette PNGs, the object of each pixel; 255 is void"),
)
_INSIDE = ("", "VOC2012", "VOCdevkit/VOC2012")


def _home(root: Path) -> Path:
    """Find the folder that holds the images: the one given, or one below it."""
    return next((root / name for name in _INSIDE if (root / name / "JPEGImages").is_dir()), root)


def variants(root: Path) -> list[str]:
    """Return the splits whose lists are there."""
    return [name for name in SPLITS if (_home(root) / "ImageSets/Segmentation" / f"{name}.txt").is_file()]


def load(
    root: Path,
    *,
    split: str | None = None,
    listing: Sequence[str] | None = None,
    wanted: ObjectFilter = ObjectFilter(),  # noqa: B008 - frozen
    allow_missing: bool = False,
) -> SceneSource:
    """Open PASCAL VOC 2012.

    The pixels of an object are those with its number in ``SegmentationObject``; the void border (255) belongs to no
    object. The class of an object is the one that most of its pixels have in ``SegmentationClass``.

    Args:
        root: ``VOC2012``, or a folder that holds it or ``VOCdevkit``.
        split: ``trainval``, ``train`` or ``val``; by default the first of these whose list is there.
        listing: names of images instead of a split.
        wanted: which objects.
        allow_missing: leave out listed images whose files are missing, and count them.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or listed files are missing.
    """
    home = _home(root)
    if split is not None:
        one_of("split", split, SPLITS)
    require_files("voc", home, TREE, home / "JPEGImages", home / "SegmentationObject", home / "SegmentationClass")
    if listing is None:
        there = variants(home)
        chosen = split or (there[0] if there else "trainval")
        lists = home / "ImageSets/Segmentation" / f"{chosen}.txt"
        require_files("voc", home, TREE, lists)
        names = read_names(lists)
    else:
        chosen, names = "list", [Path(name).stem for name in listing]
    if wanted.classes is not None:
        unknown = sorted(set(wanted.classes) - set(CLASSES))
        if unknown:
            raise DatasetError(f"VOC has no class '{unknown[0]}'; allowed: {', '.join(CLASSES)}", draw_tree(home, TREE))
    keys, missing = [], []
    for name in names:
        files = (
            home / "JPEGImages" / f"{name}.jpg",
            home / "SegmentationObject" / f"{name}.png",
            home / "SegmentationClass" / f"{name}.png",
        )
        absent = next((file for file in files if not file.is_file()), None)
        if absent is None:
            keys.append(name)
        else:
            kind = "missing-image" if absent is files[0] else "missing-annotation"
            missing.append(Problem(kind, name, f"there is no '{absent}'", absent))

    def read(key: str) -> Scene:
        return _scene(home, key, wanted)

    about = {"split": chosen, "wanted": wanted.to_dict()}
    return make_source("voc", root, keys, read, about, missing, allow_missing=allow_missing)


def _scene(home: Path, key: str, wanted: ObjectFilter) -> Scene:
    """Read one image, its objects and their classes."""
    image = load_image(home / "JPEGImages" / f"{key}.jpg")
    objects = read_labels(home / "SegmentationObject" / f"{key}.png")
    classes = read_labels(home / "SegmentationClass" / f"{key}.png")
    if not objects.shape == classes.shape == image.pixels.shape[:2]:
        raise InputError(
            f"masks of '{key}' are {objects.shape} and {classes.shape}, its image {image.pixels.shape[:2]}"
        )
    found = []
    for number in np.unique(objects):
        if number in (0, VOID):
            continue
        mask = np.asarray(objects == number, np.bool_)
        labels = classes[mask]
        labels = labels[(labels != 0) & (labels != VOID)]
        if not len(labels):
            raise InputError(f"object {number} of '{key}' has no class in SegmentationClass")
        values, counts = np.unique(labels, return_counts=True)
        label = int(values[counts.argmax()])
        if label > len(CLASSES):
            raise InputError(f"object {number} of '{key}' has class {label}; allowed: 1 to {len(CLASSES)}")
        found.append((f"{key}/{number}", CLASSES[label - 1], mask))
    return make_scene(key, image, found, wanted)
