"""COCO 2017 instances: one JSON file per split with polygons and run-length masks, read with pycocotools."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from difftap.artifacts.files import JsonObject
from difftap.datasets import voc
from difftap.datasets.layout import DatasetError, Problem, Tree, draw_tree, one_of, require_files
from difftap.datasets.objects import Mask, ObjectFilter, Scene, SceneSource, make_scene, make_source
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
"""COCO's names for VOC's classes, where they differ."""


class _Annotations(Protocol):
    """The part of ``pycocotools.coco.COCO`` that is used here; the package has no annotations."""

    def getImgIds(self) -> list[int]: ...  # noqa: N802
    def getCatIds(self) -> list[int]: ...  # noqa: N802
    def getAnnIds(self, imgIds: list[int]) -> list[int]: ...  # noqa: N802, N803
    def loadImgs(self, ids: list[int]) -> list[JsonObject]: ...  # noqa: N802
    def loadCats(self, ids: list[int]) -> list[JsonObject]: ...  # noqa: N802
    def loadAnns(self, ids: list[int]) -> list[JsonObject]: ...  # noqa: N802
    def annToMask(self, ann: JsonObject) -> Mask: ...  # noqa: N802


def variants(root: Path) -> list[str]:
    """Return the splits whose annotations are there."""
    return [name for name in SPLITS if (root / "annotations" / f"instances_{name}.json").is_file()]


def _annotations(file: Path) -> _Annotations:
    """Read a split's annotations."""
    coco = require("pycocotools.coco", "prototypes", "reading COCO")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress; our stdout is for data
            found: _Annotations = coco.COCO(str(file))
        return found
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
        listing: names of images instead of a split; they are looked up in both splits.
        wanted: which objects, by COCO's class names.
        allow_missing: leave out listed images that are missing, and count them.
        crowds: what to do with annotations of many objects at once (``iscrowd``): ``exclude`` them and count them as
            left out, or ``include`` each as one object.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or listed images are missing.
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
        # Reversed, so that the first split wins where both have the name.
        by_stem = {key.split("/", 1)[1]: key for key in reversed(files)}
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


def _infos(index: _Annotations) -> list[JsonObject]:
    return sorted(index.loadImgs(index.getImgIds()), key=lambda info: str(info["file_name"]))


def _check_classes(wanted: ObjectFilter, indices: dict[str, _Annotations], root: Path) -> None:
    """Refuse a class that no split has."""
    known = {c["name"] for index in indices.values() for c in index.loadCats(index.getCatIds())}
    asked = set(wanted.classes or ())
    # The classes of VOC may be asked for all at once, and a subset of COCO need not have all of them.
    unknown = sorted(asked - known - {VOC_NAMES.get(one, one) for one in voc.CLASSES})
    if not unknown and asked and not asked & known:
        unknown = sorted(asked)
    if unknown:
        raise DatasetError(
            f"COCO has no class '{unknown[0]}'; allowed: {', '.join(sorted(known))}", draw_tree(root, TREE)
        )


def _scene(path: Path, key: str, info: JsonObject, index: _Annotations, wanted: ObjectFilter, crowds: str) -> Scene:
    """Read one image and draw the masks of its objects from polygons and run lengths."""
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


def _mask(index: _Annotations, annotation: JsonObject, key: str) -> Mask:
    try:
        with warnings.catch_warnings():
            # numpy 2 warns about the __array__ method of pycocotools, which lacks the argument ``copy``.
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.asarray(index.annToMask(annotation), np.bool_)
    except Exception as error:  # pycocotools raises bare exceptions on malformed polygons and run lengths
        raise InputError(f"annotation {annotation.get('id')} of '{key}' has no usable mask ({error})") from error
