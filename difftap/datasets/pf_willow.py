"""PF-WILLOW (Ham et al., 2016): ten keypoints per image; pairs from a CSV file, or all ordered pairs of a class."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.datasets.keypoints import AnnotatedImage, Collector, Dataset, joined, read_list, to_number
from difftap.datasets.layout import BadPairError, DatasetError, Tree, draw_tree, locate, one_of, read_mat, require_files
from difftap.images import is_picture, walk_folder

__all__ = ["SPLITS", "TREE", "load", "variants"]

SPLITS = ("test",)
LISTS = ("auto", "csv", "mat")
TREE: Tree = (
    ("PF-dataset*/*/*.png", "the images, a folder a class: 'PF-dataset-WILLOW/car(S)/Cars_000a.png'"),
    (
        "test_pairs*.csv",
        "or test_pairs_pf.csv: imageA,imageB,XA1..10,YA1..10,XB1..10,YB1..10; without it, all pairs of a class",
    ),
    ("PF-dataset*/*/*.mat", "keypoints beside each image (pts_coord, 2x10); read if there is no CSV"),
)
_COUNT = 10
_IDS = tuple(str(k) for k in range(1, _COUNT + 1))
_COLUMNS = tuple(f"{axis}{image}{k}" for image in "AB" for axis in "XY" for k in _IDS)


def variants(root: Path) -> Iterator[dict[str, str]]:
    """Yield the options that read the one split: from the CSV file, or else from the annotations."""
    if _listing(root).is_file():
        yield {"split": "test", "pairs": "csv"}
    elif any(path.suffix == ".mat" for path in walk_folder(root)):
        yield {"split": "test", "pairs": "mat"}


def _listing(root: Path) -> Path:
    """Find the list of pairs: under its own name, or as its makers publish it beside the images."""
    names = ("test_pairs.csv", "test_pairs_pf.csv")
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def load(
    root: Path,
    *,
    split: str = "test",
    pairs: str = "auto",
    allow_missing: bool = False,
    cache: Path | None = None,  # noqa: ARG001 - one interface for all loaders
) -> Dataset:
    """Read PF-WILLOW. It has no boxes; protocols use the extent of the target's keypoints instead.

    A keypoint that is empty, NaN or exactly (-1, -1) is absent: lists are padded so, and padding must not enter that
    extent.

    Args:
        root: the folder that holds ``test_pairs.csv``, or class folders of images and ``.mat`` files at any depth.
        split: ``test``.
        pairs: ``csv``, ``mat`` (all ordered pairs of a class, in order of name), or ``auto``: the CSV if there is one.
        allow_missing: leave broken pairs out, and count them, instead of refusing the data set.
        cache: not used.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or pairs are broken.
        MissingExtraError: ``.mat`` files are to be read and scipy is not installed.
    """
    one_of("split", split, SPLITS)
    one_of("way to list pairs", pairs, LISTS)
    listing = _listing(root)
    require_files("pf-willow", root, TREE, *([listing] if pairs == "csv" else []))
    collector = Collector("pf-willow", split, root)
    if pairs == "csv" or (pairs == "auto" and listing.is_file()):
        for line in read_list(listing, ("imageA", "imageB", *_COLUMNS), root, TREE):
            with collector.pair(line.label):
                row = line.row()
                values = np.array([to_number(row[column]) for column in _COLUMNS]).reshape(2, 2, _COUNT)  # image, axis
                images = [locate(root, row[f"image{letter}"]) for letter in "AB"]
                _add(collector, images, [values[0].T, values[1].T])
    else:
        _add_all(collector, root)
    return collector.finish(allow_missing)


def _add(collector: Collector, images: list[Path], points: list[NDArray[np.float64]]) -> None:
    """Add a pair of images with keypoints ``(10, 2)`` each."""
    sides = []
    for image, xy in zip(images, points, strict=True):
        padding = (xy == -1).all(axis=1, keepdims=True)
        sides.append(AnnotatedImage(image, collector.size(image), np.where(padding, np.nan, xy)))
    category = images[0].parent.name
    collector.add(joined(f"{category}/{images[0].stem}-{images[1].stem}", category, sides, _IDS))


def _add_all(collector: Collector, root: Path) -> None:
    """Add all ordered pairs of every folder that holds ``.mat`` files."""
    folders = sorted({path.parent for path in walk_folder(root) if path.suffix == ".mat"})
    if not folders:
        raise DatasetError(
            f"'{root}' holds neither 'test_pairs.csv' nor .mat files; give the folder that holds PF-WILLOW",
            draw_tree(root, TREE),
        )
    for folder in folders:
        found = {path.stem: path for path in sorted(folder.iterdir()) if is_picture(path)}
        stems = sorted({*found, *(path.stem for path in folder.glob("*.mat"))})
        for ends in permutations(stems, 2):
            with collector.pair(f"{folder.name}/{ends[0]}-{ends[1]}"):
                images = [found.get(stem, folder / f"{stem}.png") for stem in ends]
                for image in images:
                    collector.size(image)  # first, so that a missing image is reported even without scipy
                _add(collector, images, [_points(collector, folder / f"{stem}.mat") for stem in ends])


def _points(collector: Collector, path: Path) -> NDArray[np.float64]:
    """Read ``pts_coord`` of a ``.mat`` file as ``(10, 2)``."""
    points = np.asarray(collector.document(path, read_mat)["pts_coord"], np.float64)
    if points.shape != (2, _COUNT):
        raise BadPairError("malformed", f"'{path}' has pts_coord of {points.shape}; expected (2, {_COUNT})", path)
    return points.T
