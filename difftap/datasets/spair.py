"""SPair-71k (Min et al., 2019): a JSON file per pair and per image, and lists of pairs in two layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from difftap.datasets.keypoints import AnnotatedImage, Collector, Dataset, Sample, joined, points_array, to_box
from difftap.datasets.layout import Tree, one_of, require_files

__all__ = ["SPLITS", "TREE", "load", "variants"]

SPLITS = ("trn", "val", "test")
LAYOUTS = ("large", "small")
TREE: Tree = (
    ("ImageAnnotation/*/*.json", "an image's keypoints"),
    ("JPEGImages/*/*.jpg", "the images, a folder a class"),
    ("Layout/large/*.txt", "lists of pairs: trn.txt, val.txt, test.txt; Layout/small holds shorter ones"),
    ("PairAnnotation/*/*.json", "the pairs: trn, val and test, 000001-SOURCE-TARGET:class.json"),
)
_POINTS = ("src_kps", "trg_kps")
_FLAGS = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")


def variants(root: Path) -> Iterator[dict[str, str]]:
    """Yield the options of every layout and split whose list is there."""
    for layout in LAYOUTS:
        for split in SPLITS:
            if (root / "Layout" / layout / f"{split}.txt").is_file():
                yield {"split": split, "layout": layout}


def load(
    root: Path,
    *,
    split: str = "test",
    layout: str = "large",
    allow_missing: bool = False,
    cache: Path | None = None,  # noqa: ARG001 - one interface for all loaders
) -> Dataset:
    """Read SPair-71k.

    Keypoints and boxes are kept as annotated. Some keypoints lie outside their box. Boxes count pixels from 1, as
    PASCAL VOC's do, so they may end at W or H. The other keypoints of the target, which PCK-dagger needs, come from the
    image annotations; if the folder has none, only the pair's own keypoints are used, and a note says so.

    Args:
        root: the folder that holds ``PairAnnotation``.
        split: ``trn``, ``val`` or ``test``.
        layout: ``large`` (70,958 pairs in all) or ``small``.
        allow_missing: leave broken pairs out, and count them, instead of refusing the data set.
        cache: not used.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or pairs are broken.
    """
    one_of("split", split, SPLITS)
    one_of("layout", layout, LAYOUTS)
    listing = root / "Layout" / layout / f"{split}.txt"
    require_files("spair", root, TREE, listing, root / "PairAnnotation" / split, root / "JPEGImages")
    collector = Collector("spair", split, root)
    with_images = (root / "ImageAnnotation").is_dir()
    if not with_images:
        collector.note("no ImageAnnotation: PCK-dagger's rivals are the keypoints that the pair annotates")
    for line in listing.read_text(encoding="utf-8").splitlines():
        name = line.strip()
        if name:
            with collector.pair(name):
                collector.add(_sample(collector, root, split, name, with_images))
    return collector.finish(allow_missing)


def _sample(collector: Collector, root: Path, split: str, name: str, with_images: bool) -> Sample:
    """Read one pair from its own annotation and that of the target image."""
    # Not kept: each of the 70,958 files is read once. The images' annotations below are shared by many pairs.
    pair = collector.json(root / "PairAnnotation" / split / f"{name}.json", keep=False)
    category = str(pair["category"])
    images = [root / "JPEGImages" / category / str(pair[f"{side}_imname"]) for side in ("src", "trg")]
    sizes = [
        collector.size(image, pair.get(f"{side}_imsize")) for side, image in zip(("src", "trg"), images, strict=True)
    ]
    names = tuple(str(key) for key in pair["kps_ids"])
    both = [
        AnnotatedImage(image, size, points_array(pair[key]))
        for image, size, key in zip(images, sizes, _POINTS, strict=True)
    ]
    visible = dict(zip(names, both[1].points, strict=True))
    if with_images:
        known = collector.json(root / "ImageAnnotation" / category / f"{images[1].stem}.json")["kps"]
        visible = dict(zip(map(str, known), points_array(list(known.values())), strict=True))
    visible = {key: point for key, point in visible.items() if np.isfinite(point).all()}
    if pair.get("mirror"):
        collector.note("a pair has mirror set; it is read as a description, and no image is flipped")
    sample = joined(name, category, both, names)
    return dataclasses.replace(
        sample,
        target_visible=points_array(list(visible.values())),
        target_ids=tuple(visible),
        source_box=to_box(pair["src_bndbox"]),
        target_box=to_box(pair["trg_bndbox"]),
        flags={flag: int(pair[flag]) for flag in _FLAGS if flag in pair},
    )
