"""COCO 2017 instances: one JSON file per split with polygons and run-length masks, read with pycocotools."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from difftap.artifacts.files import JsonObject
from difftap.coords import Size
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


def variants(root: Path) -> list[str]:
    """Return the splits whose annotations are there."""
    return [name for name in SPLITS if (root / "annotations" / f"instances_{name}.json").is_file()]


_LONGEST = 65_536
"""Sides of an image beyond which masks are not drawn: one number in a file could otherwise ask for all memory."""


@dataclass(frozen=True)
class _Split:
    """A split's annotations, every reference in them looked up.

    Attributes:
        images: the images' entries, by their keys.
        objects: the annotations of each image, by its key; under ``class`` the name of their category.
        classes: names of all categories.
        faults: what is wrong with an image or its annotations, by the image's key.
        unused: what the file holds that belongs to no image, in words.
    """

    images: Mapping[str, JsonObject]
    objects: Mapping[str, list[JsonObject]]
    classes: frozenset[str]
    faults: Mapping[str, str]
    unused: tuple[str, ...]


def _read_split(file: Path, split: str) -> _Split:
    """Read a split's annotations.

    pycocotools' own index is not used: of entries with equal ids it keeps the last and gives that one several times.

    Raises:
        DatasetError: the file is no COCO file, or the ids of categories are not unique.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        images, annotations, categories = (_entries(data, name) for name in ("images", "annotations", "categories"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise DatasetError(f"'{file}' cannot be read as COCO annotations ({error}); restore it") from error
    names = {_id(one): str(one["name"]) for one in categories if _id(one) is not None and "name" in one}
    if len(names) < len(categories):
        raise DatasetError(f"'{file}' has categories without id or name, or with equal ids; each needs its own")
    named = [info for info in images if isinstance(info.get("file_name"), str) and _id(info) is not None]
    keys, faults = _keys(named, split)
    by_id = {_id(info): key for key, info in keys.items()}
    objects: dict[str, list[JsonObject]] = {key: [] for key in keys}
    orphans: list[object] = []
    owner: dict[object, str] = {}
    for place, one in enumerate(annotations):
        image, category = one.get("image_id"), one.get("category_id")
        number = f"entry-{place}" if _id(one) is None else _id(one)
        key = by_id.get(image) if isinstance(image, int | str) else None
        if key is None:
            orphans.append(image)
        elif number in owner:
            # The two would be one instance in every table made of them, and one would stand for the other.
            faults[key] = faults[owner[number]] = f"annotation id {number} stands there twice"
        elif not isinstance(category, int | str) or category not in names:
            faults[key] = f"annotation {number} has category_id {category!r}, which the file's categories do not list"
        else:
            owner[number] = key
            objects[key].append({**one, "id": number, "class": names[category]})
    unused = []
    if len(named) < len(images):
        unused.append(f"{len(images) - len(named)} images have no file_name or no id in '{file}'")
    if orphans:
        unused.append(f"{len(orphans)} annotations are of images that '{file}' does not list, such as {orphans[0]!r}")
    return _Split(keys, objects, frozenset(names.values()), faults, tuple(unused))


def _entries(data: object, name: str) -> list[JsonObject]:
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"it has no list '{name}' of objects")
    return found


def _id(entry: JsonObject) -> int | str | None:
    found = entry.get("id")
    return found if isinstance(found, int | str) else None


def _keys(images: Sequence[JsonObject], split: str) -> tuple[dict[str, JsonObject], dict[str, str]]:
    """Name each image by its stem, with folders and ending where stems are not unique; find what is wrong with it."""
    counts = Counter(map(_id, images))
    ordered = sorted(images, key=lambda info: str(info["file_name"]))
    paths = [PurePosixPath(str(info["file_name"])) for info in ordered]
    forms: list[list[str]] = [
        [path.stem for path in paths],
        [path.with_suffix("").as_posix() if path.name else str(path) for path in paths],
        [str(path) for path in paths],
        [f"{path}#{info['id']}" for path, info in zip(paths, ordered, strict=True)],
    ]
    form = next((one for one in forms if len(set(one)) == len(one)), forms[-1])
    keys, faults = {}, {}
    files = Counter(map(str, paths))
    for name, path, info in zip(form, paths, ordered, strict=True):
        key = f"{split}/{name}"
        keys[key] = info
        if path.is_absolute() or ".." in path.parts:
            faults[key] = f"its file_name {str(path)!r} leaves the folder"
        elif counts[_id(info)] > 1:  # nothing tells which image its annotations are of
            faults[key] = f"image id {_id(info)} stands there twice"
        elif files[str(path)] > 1:
            faults[key] = f"two images have the file_name {str(path)!r}"
    return keys, faults


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
    require("pycocotools.mask", "prototypes", "reading COCO")
    splits = {s: _read_split(root / "annotations" / f"instances_{s}.json", s) for s in chosen}
    _check_classes(wanted, splits.values(), root)
    files = {key: (s, info) for s, found in splits.items() for key, info in found.images.items()}
    names, missing = list(files), []
    if listing is not None:
        names = []
        # Reversed, so that the first split wins where both have the name.
        by_stem = {PurePosixPath(key).stem: key for key in reversed(files)}
        for name in listing:
            key = name if name in files else by_stem.get(Path(name).stem)
            if key is None:
                missing.append(Problem("missing-annotation", name, f"no annotations name it ({', '.join(chosen)})"))
            else:
                names.append(key)
    keys = []
    for key in names:
        path = root / files[key][0] / files[key][1]["file_name"]
        if path.is_file() or key in splits[files[key][0]].faults:
            keys.append(key)
        else:
            missing.append(Problem("missing-image", key, f"there is no image '{path}'", path))

    def read(key: str) -> Scene:
        part, info = files[key]
        if key in splits[part].faults:
            raise InputError(f"'{key}' cannot be used: {splits[part].faults[key]}")
        return _scene(root / part / info["file_name"], key, info, splits[part].objects[key], wanted, crowds)

    about = {
        "split": "list" if listing is not None else chosen[0],
        "wanted": wanted.to_dict(),
        "crowds": crowds,
    }
    unused = tuple(line for found in splits.values() for line in found.unused)
    return make_source("coco", root, keys, read, about, missing, allow_missing=allow_missing, unused=unused)


def _check_classes(wanted: ObjectFilter, splits: Iterable[_Split], root: Path) -> None:
    """Refuse a class that no split has."""
    known = {name for split in splits for name in split.classes}
    asked = set(wanted.classes or ())
    # The classes of VOC may be asked for all at once, and a subset of COCO need not have all of them.
    unknown = sorted(asked - known - {VOC_NAMES.get(one, one) for one in voc.CLASSES})
    if not unknown and asked and not asked & known:
        unknown = sorted(asked)
    if unknown:
        raise DatasetError(
            f"COCO has no class '{unknown[0]}'; allowed: {', '.join(sorted(known))}", draw_tree(root, TREE)
        )


def _scene(
    path: Path, key: str, info: JsonObject, annotations: list[JsonObject], wanted: ObjectFilter, crowds: str
) -> Scene:
    """Read one image and draw the masks of its objects from polygons and run lengths."""
    image = load_image(path)
    said = (info.get("width", image.size[0]), info.get("height", image.size[1]))  # the file itself is what counts
    if image.size != said:
        raise InputError(f"'{path}' is {image.size[0]}x{image.size[1]}, but annotated as {said[0]}x{said[1]}")
    found = []
    left_out = {"crowd": 0, "no mask": 0}
    for one in annotations:
        if one.get("iscrowd") and crowds == "exclude":
            left_out["crowd"] += 1
        elif not one.get("segmentation"):
            left_out["no mask"] += 1
        else:
            try:
                mask = _draw(one["segmentation"], image.size)
            except Exception as error:  # pycocotools raises bare exceptions on malformed polygons and run lengths
                raise InputError(f"annotation {one.get('id')} of '{key}' has no usable mask ({error})") from error
            found.append((f"{key}/{one['id']}", one["class"], mask))
    return make_scene(key, image, found, wanted, {reason: count for reason, count in left_out.items() if count})


def _draw(segmentation: object, size: Size) -> Mask:
    """Draw a mask ``(H, W)`` of polygons, of counted runs, or of compressed runs.

    Every number is checked before pycocotools' C code sees it: on others that code takes all memory, crashes, or leaves
    part of the mask uninitialised.

    Raises:
        ValueError: a number is not finite or far outside the image, or runs do not cover it.
    """
    width, height = size
    if max(size) > _LONGEST:
        raise ValueError(f"the image is {width} x {height} pixels; allowed: sides up to {_LONGEST}")
    if isinstance(segmentation, dict):
        runs = _runs(segmentation, size)
        # Runs of 0 and 1 in turns, 0 first, down the columns.
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    if not isinstance(segmentation, list):
        raise ValueError(f"segmentation is a {type(segmentation).__name__}; allowed: polygons or run lengths")
    from pycocotools import mask as coder

    polygons = [_polygon(one, size) for one in segmentation]
    with warnings.catch_warnings():
        # numpy 2 warns about the __array__ method of pycocotools, which lacks the argument ``copy``.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(coder.decode(coder.merge(coder.frPyObjects(polygons, height, width))), np.bool_)


def _polygon(points: object, size: Size) -> list[float]:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        raise ValueError("a polygon is no list of three or more x, y")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in points):
        raise ValueError("a coordinate of a polygon is no finite number")
    # Some programs draw a little over the border. pycocotools walks along every edge, pixel by pixel, also outside.
    far = max(size)
    if not all(-far <= one <= 2 * far for one in points):
        raise ValueError(f"a coordinate of a polygon lies far outside the image of {size[0]} x {size[1]} pixels")
    return [float(one) for one in points]


def _runs(segmentation: JsonObject, size: Size) -> list[int]:
    """Read run lengths, counted or compressed, that cover the image."""
    width, height = size
    stated, counts = segmentation.get("size"), segmentation.get("counts")
    if stated != [height, width]:
        raise ValueError(f"run lengths are of size {stated!r}; allowed: the image's, [{height}, {width}]")
    if isinstance(counts, str | bytes):
        counts = _decompressed(counts if isinstance(counts, bytes) else counts.encode("ascii"), width * height)
    if not isinstance(counts, list) or not all(type(one) is int and 0 <= one <= width * height for one in counts):
        raise ValueError("run lengths are no list of whole numbers from 0 on")
    if sum(counts) != width * height:
        raise ValueError(f"run lengths sum to {sum(counts)}; allowed: the image's {width * height} pixels")
    return counts


def _decompressed(text: bytes, most: int) -> list[int]:
    """Read COCO's compressed run lengths: 5 bits a character from ``0`` on, the sixth says that more follow.

    From the third run on, the difference to the run two before is stored (pycocotools, ``rleFrString``).

    Raises:
        ValueError: a character is out of range, or the text ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("compressed run lengths hold a character that is none of theirs")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift  # the sign bit of the last five
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if not 0 <= runs[-1] <= most:
            raise ValueError(f"a compressed run length is {runs[-1]}; allowed: 0 to the image's {most} pixels")
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return runs
