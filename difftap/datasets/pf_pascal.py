"""PF-PASCAL (Ham et al., 2018): lists of pairs that contain keypoints, or lists with separate ``.mat`` annotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from difftap.artifacts.manifest import file_digest
from difftap.datasets.keypoints import (
    AnnotatedImage,
    Collector,
    Dataset,
    joined,
    read_list,
    save_png,
    to_box,
    to_number,
)
from difftap.datasets.layout import BadPairError, DatasetError, Tree, locate, one_of, read_mat, require_files
from difftap.images import load_image

__all__ = ["SPLITS", "TREE", "load", "mirrored", "mirrored_copy", "variants", "write_mirrored"]

# ---- mirroring left to right: annotations, and copies of images


def mirrored(side: AnnotatedImage) -> AnnotatedImage:
    """Mirror the annotations of an image left to right: pixel 0 becomes pixel W - 1 (`difftap.coords`).

    >>> side = mirrored(AnnotatedImage(Path("a.png"), (10, 8), np.array([[0.0, 5.0]]), (0.0, 1.0, 3.0, 2.0)))
    >>> side.points.tolist(), side.box
    ([[9.0, 5.0]], (6.0, 1.0, 9.0, 2.0))
    """
    end = side.size[0] - 1.0
    points = np.stack([end - side.points[:, 0], side.points[:, 1]], axis=1)
    box = side.box and (end - side.box[2], side.box[1], end - side.box[0], side.box[3])
    return replace(side, points=points, box=box)


def mirrored_copy(image: Path, digest: str, cache: Path) -> Path:
    """Give the path of an image's mirrored copy. The file's digest is in the name: a changed image gets a new copy."""
    return cache / f"{image.stem}-{digest[:16]}-mirrored.png"


def write_mirrored(image: Path, copy: Path) -> None:
    """Write an image, upright and mirrored, as PNG."""
    save_png(copy, load_image(image).pixels[:, ::-1])


# ---- the data set

SPLITS = ("trn", "val", "test")
FLIPS = ("both", "target", "ignore")
TREE: Tree = (
    ("PF-dataset-PASCAL/JPEGImages/*.jpg", "the images"),
    ("*test_pairs*.csv", "source_image,target_image,class and XA,YA,XB,YB (';' between), or no keypoints"),
    ("*val_pairs*.csv", "the same for validation"),
    ("*tr*n_pairs*.csv", "the same for training, with a column flip"),
    ("PF-dataset-PASCAL/Annotations/*/*.mat", "kps and bbox, a folder a class; for lists without keypoints"),
)
_FIRST_HALF = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
_SECOND_HALF = (
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CLASSES = (*_FIRST_HALF, *_SECOND_HALF)
"""PASCAL VOC's classes, in the order in which the lists number them, from 1."""
_NAMES = {"trn": ("trn", "train"), "val": ("val",), "test": ("test",)}


def _lists(root: Path, split: str) -> list[Path]:
    """Return the lists of a split that are there. First come those that can be read with the annotations present."""
    inner = root / "PF-dataset-PASCAL"
    with_mat = (root / "Annotations").is_dir() or (inner / "Annotations").is_dir()
    endings = ["", "_pf_pascal"] if with_mat else ["_pf_pascal", ""]
    names = [f"{part}_pairs{ending}.csv" for ending in endings for part in _NAMES[split]]
    named = [folder / name for name in names for folder in (root, inner)]
    others = [path for folder in (root, inner) for path in sorted(folder.glob(f"*{_NAMES[split][-1]}_pairs*.csv"))]
    return list(dict.fromkeys(path for path in named + others if path.is_file()))


def variants(root: Path) -> Iterator[dict[str, str]]:
    """Yield the options of every list of every split that is there."""
    for split in SPLITS:
        for path in _lists(root, split):
            yield {"split": split, "pairs": path.relative_to(root).as_posix()}


def load(
    root: Path,
    *,
    split: str = "test",
    pairs: str | None = None,
    flip: str = "both",
    allow_missing: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Read PF-PASCAL. Keypoints are kept as annotated; a keypoint that is NaN or empty is absent.

    Args:
        root: the folder that holds the lists and ``PF-dataset-PASCAL``, or that folder itself.
        split: ``trn``, ``val`` or ``test``.
        pairs: the name of a list below ``root``. By default the split's own list: ``test_pairs.csv`` before
            ``test_pairs_pf_pascal.csv`` if the folder ``Annotations`` is there, otherwise the other way round.
        flip: what a 1 in the list's column ``flip`` means: ``both`` images are mirrored, as in every public reader of
            these lists; the ``target`` alone is (`Sample.mirrored`); or ``ignore`` the column.
        allow_missing: leave broken pairs out, and count them, instead of refusing the data set.
        cache: where mirrored copies are written; needed for ``both`` if the list has such pairs.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or pairs are broken.
        MissingExtraError: ``.mat`` files are to be read and scipy is not installed.
    """
    one_of("split", split, SPLITS)
    one_of("reading of 'flip'", flip, FLIPS)
    listing = root / pairs if pairs else next(iter(_lists(root, split)), root / f"{split}_pairs.csv")
    require_files("pf-pascal", root, TREE, listing)
    lines = read_list(listing, ("source_image", "target_image", "class"), root, TREE)
    collector = Collector("pf-pascal", split, root)
    if lines and "XA" in lines[0].header:
        collector.note("keypoints are numbered within each pair: this list does not name them")
    for line in lines:
        with collector.pair(line.label):
            row = line.row()
            category = _category(row["class"])
            sides = [_side(collector, root, row, end, category) for end in ("source", "target")]
            ids = [str(k) for k in range(len(sides[0].points))]
            flipped = _flag(row.get("flip", "")) and flip != "ignore"
            name = f"{category}/{sides[0].image.stem}-{sides[1].image.stem}" + ("-flip" if flipped else "")
            if flipped and flip == "both":
                sides = [_copied(collector, mirrored(side), cache) for side in sides]
            elif flipped:
                sides[1] = mirrored(sides[1])
            collector.add(joined(name, category, sides, ids, mirrored=flipped and flip == "target"))
    return collector.finish(allow_missing)


def _category(cell: str) -> str:
    """Return the class that a cell names by its number from 1 or by its name."""
    name = CLASSES[int(cell) - 1] if cell.isdecimal() and 1 <= int(cell) <= len(CLASSES) else cell
    if name not in CLASSES:
        raise BadPairError("malformed", f"class '{cell}' does not exist; allowed: 1 to 20, or a class's name")
    return name


def _flag(cell: str) -> bool:
    if cell not in ("", "0", "1"):
        raise BadPairError("malformed", f"flip is '{cell}'; allowed: 0 or 1")
    return cell == "1"


def _side(collector: Collector, root: Path, row: dict[str, str], end: str, category: str) -> AnnotatedImage:
    """Read one image of a pair: its keypoints from the list, or from its ``.mat`` file if the list has none."""
    image = locate(root, row[f"{end}_image"])
    if "XA" in row:
        letter = "A" if end == "source" else "B"
        xs, ys = ([to_number(cell) for cell in row[f"{axis}{letter}"].split(";")] for axis in "XY")
        if len(xs) != len(ys):
            raise BadPairError("malformed", f"X{letter} has {len(xs)} numbers and Y{letter} {len(ys)}; must be equal")
        return AnnotatedImage(image, collector.size(image), np.array([xs, ys], np.float64).T)
    size = collector.size(image)  # first, so that a missing image is reported even without scipy
    file = locate(root, f"PF-dataset-PASCAL/Annotations/{category}/{image.stem}.mat")
    content = collector.document(file, read_mat)
    points = np.asarray(content["kps"], np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise BadPairError("malformed", f"'{file}' has kps of {points.shape}; expected (N, 2)", file)
    box = to_box(content["bbox"]) if "bbox" in content else None
    return AnnotatedImage(image, size, points, box)


def _copied(collector: Collector, side: AnnotatedImage, cache: Path | None) -> AnnotatedImage:
    """Give a mirrored side the mirrored copy as its image; the copy is written when the pair is first used."""
    if cache is None:
        raise DatasetError("the list has mirrored pairs; give cache, a folder for the copies, or choose another flip")
    copy = mirrored_copy(side.image, collector.document(side.image, file_digest), cache)
    collector.generators[copy] = partial(write_mirrored, side.image, copy)
    return AnnotatedImage(copy, side.size, side.points, side.box)
