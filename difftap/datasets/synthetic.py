"""A set of known warps: each image of any folder, and itself bent, recoloured and partly covered.

The ground truth is exact: keypoints lie on the source's pixel centres and go where the warp takes them. Those that
leave the image or are covered are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difftap.artifacts.manifest import file_digest
from difftap.datasets.collect import Collector, Dataset
from difftap.datasets.distort import Distortion, Making, keypoints
from difftap.datasets.layout import BadPairError, DatasetError, Tree, draw_tree, one_of, require_files
from difftap.datasets.samples import Sample
from difftap.errors import InputError
from difftap.images import find_pictures

__all__ = ["SPLITS", "TREE", "Distortion", "load", "variants"]

SPLITS = ("all",)
TREE: Tree = (("**/*.*", "JPEG, PNG and other pictures, at any depth; an image's folder is its class"),)
_SMALLEST = 16  # pixels a side


def variants(root: Path) -> Iterator[dict[str, Any]]:
    """The one split, if there is such a folder."""
    if root.is_dir():
        yield {"split": "all"}


def load(
    root: Path,
    *,
    split: str = "all",
    distortion: Distortion | None = None,
    limit: int | None = None,
    allow_missing: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Make pairs of a folder's images. Source and target are equally large, and the box of each is the whole image.

    Args:
        root: a folder of images, read at any depth, in order of name; what lies in ``cache``, and what
            benchmark runs wrote, is no part of it.
        split: ``all``.
        distortion: how targets are made.
        limit: images to take, spread evenly over the folder; all by default.
        allow_missing: leave unusable images out, and count them, instead of refusing the folder.
        cache: the folder for targets; each is written when its pair is first taken from the data set.

    Raises:
        DatasetError: there is no such folder, it holds no images, or images are broken.
    """
    one_of("split", split, SPLITS)
    require_files("synthetic", root, TREE)
    if cache is None:
        raise DatasetError("the synthetic data set writes images; give cache, a folder for them")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; allowed: 1 or more images")
    # What runs wrote under the root (targets, plots, galleries) is no part of it: each has a file of predictions.
    runs = {path.parent for path in root.rglob("predictions.jsonl")} - {root}
    files = [path for path in find_pictures(root) if runs.isdisjoint(path.parents)]
    if cache.resolve() == root.resolve():
        raise InputError(f"cache is '{cache}', the folder of the images itself; give another one for what is made")
    if cache.resolve().is_relative_to(root.resolve()):
        files = [path for path in files if not path.resolve().is_relative_to(cache.resolve())]
    if not files:
        raise DatasetError(f"no images in '{root}'; give a folder of images", draw_tree(root, TREE))
    count = min(limit or len(files), len(files))
    collector = Collector("synthetic", split, root)
    for file in (files[k * len(files) // count] for k in range(count)):
        for kind in (distortion or Distortion()).kinds:
            with collector.pair(f"{file.relative_to(root).as_posix()}:{kind}"):
                collector.add(_sample(collector, root, file, cache, distortion or Distortion(), kind))
    return collector.finish(allow_missing)


def _sample(collector: Collector, root: Path, file: Path, cache: Path, distortion: Distortion, kind: str) -> Sample:
    """An image and one of its warps."""
    width, height = size = collector.size(file)
    if min(size) < _SMALLEST:
        raise BadPairError(
            "malformed", f"'{file}' is {width}x{height}; allowed: {_SMALLEST} pixels a side or more", file
        )
    making = Making(distortion, kind, file, collector.document(file, file_digest))
    source, target = keypoints(making, size)
    made = cache / f"{file.stem}-{kind}-{making.key[:16]}.png"
    collector.makers[made] = lambda: making.draw(made)
    place = file.relative_to(root)
    ids = tuple(f"{x:.0f},{y:.0f}" for x, y in source)
    box = (0.0, 0.0, float(width), float(height))
    return Sample(
        name=f"{place.as_posix()}:{kind}",
        source=file,
        target=made,
        category=place.parent.as_posix() if len(place.parts) > 1 else "all",
        source_points=source,
        target_points=target,
        keypoint_ids=ids,
        target_visible=target,
        target_ids=ids,
        source_size=size,
        target_size=size,
        source_box=box,
        target_box=box,
    )
