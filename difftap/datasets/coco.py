"""COCO 2017 instances: polygons and run-length masks in one JSON file a split, read with pycocotools."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftap.datasets import voc
from difftap.datasets.layout import DatasetError, Problem, Tree, draw_tree, one_of, require_files
from difftap.datasets.objects import ObjectFilter, Scene, SceneSource, make_scene, make_source
from difftap.errors import InputError, require
from difftap.images import load_image

__all__ = ["CROWDS", "SPLITS", "TREE", "VOC_NAMES", "load", "variants"]

SPLITS = ("val2017", "train2017")
CROWDS = ("exclude", "include")
TREE: Tree = (
    ("annotations/instances_*.json", "the annotations: instances_train2017.json, instances_val2017.json"),
    ("train2017/*.jpg", "the images of a split"),
    ("val2017/*.jpg", "the images of a split"),
)
VOC_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""What COCO calls VOC's classes, where the names differ."""


def variants(root: Path) -> list[str]:
    """Return the splits whose annotations are there."""
    return [name for name in SPLITS if (root / "annotations" / f"instances_{name}.json").is_file()]


def _annotations(file: Path) -> Any:
    """Return a split's annotations; pycocotools speaks on stdout, which belongs to data."""
    coco = require("pycocotools.coco", "prototypes", "reading COCO")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return coco.COCO(str(file))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DatasetError(f"'{file}' cannot be read as COCO annotations ({error}); restore it") from error


def load(
    root: Path,
    *,
    split: str | None = None,
    listing: Sequence[str] | None = None,
    wanted: ObjectFilter = ObjectFilter(),  # noqa: B008 - frozen
    allow_missing: bool = False,
    crowds: str = "exclude",
) -> SceneSource:
    """Open COCO 2017.

    Args:
        root: the folder that holds ``annotations``.
        split: ``val2017`` or ``train2017``; by default the first of these whose annotations are there.
        listing: names of images instead of a split, looked up in both.
        wanted: which objects, by COCO's class names.
        allow_missing: leave out listed images that are missing, and count them.
        crowds: ``exclude`` annotations that stand for many objects at once (``iscrowd``), counted among what is left
            out; or ``include`` them as objects like any other.

    Raises:
        DatasetError: the folder is not laid out so, or listed images are missing.
        MissingExtraError: pycocotools is not installed.
    """
    one_of("crowds", crowds, CROWDS)
    if split is not None:
        one_of("split", split, SPLITS)
    require_files("coco", root, TREE, root / "annotations")
    there = variants(root)
    chosen = [split] if split else (there if listing is not None else there[:1])
    require_files("coco", root, TREE, *(root / "annotations" / f"instances_{s}.json" for s in chosen or SPLITS[:1]))
    indices = {s: _annotations(root / "annotations" / f"instances_{s}.json") for s in chosen}
    _check_classes(wanted, indices, root)
    files = {f"{s}/{Path(info['file_name']).stem}": (s, info) for s, index in indices.items() for info in _infos(index)}
    names, missing = list(files), []
    if listing is not None:
        names = []
        by_stem = {key.split("/", 1)[1]: key for key in reversed(files)}  # of two splits, the first asked for
        for name in listing:
            key = name if name in files else by_stem.get(Path(name).stem)
            if key is None:
                missing.append(Problem("missing-annotation", name, f"no annotations name it ({', '.join(chosen)})"))
            else:
                names.append(key)
    keys = []
    for key in names:
        path = root / files[key][0] / files[key][1]["file_name"]
        if path.is_file():
            keys.append(key)
        else:
            missing.append(Problem("missing-image", key, f"there is no image '{path}'", path))

    def read(key: str) -> Scene:
        part, info = files[key]
        return _scene(root / part / info["file_name"], key, info, indices[part], wanted, crowds)

    about = {
        "split": "list" if listing is not None else chosen[0],
        "wanted": wanted.to_dict(),
        "crowds": crowds,
    }
    return make_source("coco", root, keys, read, about, missing, allow_missing=allow_missing)


def _infos(index: Any) -> list[dict[str, Any]]:
    return sorted(index.loadImgs(index.getImgIds()), key=lambda info: str(info["file_name"]))


def _check_classes(wanted: ObjectFilter, indices: dict[str, Any], root: Path) -> None:
    """Refuse a class that no split knows; of VOC's, a part of COCO need not hold every one."""
    known = {c["name"] for index in indices.values() for c in index.loadCats(index.getCatIds())}
    asked = set(wanted.classes or ())
    unknown = sorted(asked - known - {VOC_NAMES.get(one, one) for one in voc.CLASSES})
    if not unknown and asked and not asked & known:
        unknown = sorted(asked)
    if unknown:
        raise DatasetError(
            f"COCO has no class '{unknown[0]}'; allowed: {', '.join(sorted(known))}", draw_tree(root, TREE)
        )


def _scene(path: Path, key: str, info: dict[str, Any], index: Any, wanted: ObjectFilter, crowds: str) -> Scene:
    """One image and its objects: polygons and run lengths become masks."""
    image = load_image(path)
    if image.size != (info["width"], info["height"]):
        raise InputError(
            f"'{path}' is {image.size[0]}x{image.size[1]}, but annotated as {info['width']}x{info['height']}"
        )
    found = []
    left_out = {"crowd": 0, "no mask": 0}
    for one in index.loadAnns(index.getAnnIds(imgIds=[info["id"]])):
        if one.get("iscrowd") and crowds == "exclude":
            left_out["crowd"] += 1
        elif not one.get("segmentation"):
            left_out["no mask"] += 1
        else:
            name = index.loadCats([one["category_id"]])[0]["name"]
            found.append((f"{key}/{one['id']}", name, _mask(index, one, key)))
    return make_scene(key, image, found, wanted, {reason: count for reason, count in left_out.items() if count})


def _mask(index: Any, annotation: dict[str, Any], key: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' arrays are older than numpy 2's protocol
            return np.asarray(index.annToMask(annotation), np.bool_)
    except Exception as error:  # pycocotools raises bare exceptions on malformed polygons and run lengths
        raise InputError(f"annotation {annotation.get('id')} of '{key}' has no usable mask ({error})") from error
