"""Your own images: a folder of pictures and a folder of mask PNGs of the same names."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from difftap.datasets.layout import DatasetError, Problem, Tree, draw_tree, one_of, require_files
from difftap.datasets.objects import ObjectFilter, Scene, SceneSource, make_scene, make_source
from difftap.errors import InputError
from difftap.images import FolderScan, load_image, object_numbers, read_labels, walk_folder

__all__ = ["TREE", "load", "variants"]

TREE: Tree = (
    ("images/**/*.*", "the pictures; the folder below images/ that holds one is its objects' class"),
    ("masks/**/*.png", "palette, 8-bit or 16-bit PNGs of the same names: 0 background, a number an object, 255 void"),
    ("objects.csv", "optional: image,object,class[,instance], where folders do not say the class"),
)


def variants(root: Path) -> list[str]:
    """Return the one split ``all``, if the folder has images and masks."""
    return ["all"] if (root / "images").is_dir() and (root / "masks").is_dir() else []


def load(
    root: Path,
    *,
    split: str | None = None,
    listing: Sequence[str] | None = None,
    wanted: ObjectFilter = ObjectFilter(),  # noqa: B008 - frozen
    allow_missing: bool = False,
) -> SceneSource:
    """Open a folder of pictures with masks.

    Args:
        root: the folder that holds ``images`` and ``masks``.
        split: ``all``.
        listing: names of images, with their folder below ``images`` if they have one; with or without an ending.
        wanted: which objects.
        allow_missing: leave out pictures without a mask, and listed ones that are missing, and count them.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or masks are missing.
    """
    if split is not None:
        one_of("split", split, ("all",))
    require_files("folder", root, TREE, root / "images", root / "masks")
    home = root / "images"
    scan = FolderScan.of(home)
    named = _named(root)
    pictures: dict[str, Path] = {}
    missing = []
    for path in scan.pictures:
        name = path.relative_to(home).with_suffix("").as_posix()
        if name in pictures:  # which of the two the mask is of, nothing tells
            text = f"'{pictures[name]}' and '{path}' have one name, and so one mask; rename one of them and its mask"
            missing.append(Problem("same-name", name, text, path))
        else:
            pictures[name] = path
    doubled = {problem.pair for problem in missing}
    names = [name for name in pictures if name not in doubled]
    if listing is not None:
        names = [name if name in pictures else Path(name).with_suffix("").as_posix() for name in listing]
    keys = []
    for name in names:
        mask = root / "masks" / f"{name}.png"
        if name not in pictures:
            missing.append(Problem("missing-image", name, f"there is no picture '{home / name}.*'"))
        elif not mask.is_file():
            missing.append(Problem("missing-annotation", name, f"there is no mask '{mask}'", mask))
        else:
            keys.append(name)

    def read(key: str) -> Scene:
        return _scene(root, pictures[key], key, named, wanted)

    about = {"split": "list" if listing is not None else "all", "wanted": wanted.to_dict()}
    unused = _unused(root, scan, pictures, named)
    return make_source("folder", root, keys, read, about, missing, allow_missing=allow_missing, unused=unused)


def _unused(
    root: Path, scan: FolderScan, pictures: Mapping[str, Path], named: Mapping[tuple[str, int], tuple[str, str]]
) -> list[str]:
    """Say what the folder holds beside pictures with masks."""
    said = [f"images/ holds {scan.left_out}"] if scan.left_out else []
    masks = [path.relative_to(root / "masks") for path in walk_folder(root / "masks")]
    lone = sorted(path for path in masks if path.suffix != ".png" or path.with_suffix("").as_posix() not in pictures)
    if lone:
        said.append(f"{len(lone)} files in masks/ belong to no picture, such as '{lone[0]}'; masks are PNGs")
    strange = sorted({name for name, _ in named} - pictures.keys())
    if strange:
        said.append(f"objects.csv names {len(strange)} images that are not there, such as '{strange[0]}'")
    return said


def _named(root: Path) -> Mapping[tuple[str, int], tuple[str, str]]:
    """Read ``objects.csv``: (image, number) -> (class, identity); empty if there is no such file."""
    path = root / "objects.csv"
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:  # spreadsheet programs write a byte order mark
            rows = list(csv.DictReader(handle))
        named = {}
        for row in rows:
            name = Path(row["image"].strip()).with_suffix("").as_posix()
            number = int(row["object"])
            named[name, number] = (row["class"].strip(), (row.get("instance") or "").strip() or f"{name}/{number}")
        return named
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}); allowed: the columns image,object,class and "
            "optionally instance",
            draw_tree(root, TREE),
        ) from error


def _scene(
    root: Path, path: Path, key: str, named: Mapping[tuple[str, int], tuple[str, str]], wanted: ObjectFilter
) -> Scene:
    """Read one picture and its objects."""
    image = load_image(path)
    labels = read_labels(root / "masks" / f"{key}.png")
    if labels.shape != image.pixels.shape[:2]:
        raise InputError(f"the mask of '{key}' is {labels.shape}, its picture {image.pixels.shape[:2]}")
    folder = Path(key).parent.as_posix()
    category = "object" if folder == "." else folder
    found = []
    for number in object_numbers(labels):
        name, instance = named.get((key, int(number)), (category, f"{key}/{number}"))
        found.append((instance, name, np.asarray(labels == number, np.bool_)))
    return make_scene(key, image, found, wanted)
