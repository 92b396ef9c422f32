"""DAVIS 2017: video clips with one palette PNG per frame; a number means the same object in all frames of a clip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from difftap.datasets.layout import DatasetError, Problem, Tree, draw_tree, one_of, require_files
from difftap.datasets.objects import ObjectFilter, Scene, SceneSource, make_scene, make_source, read_names
from difftap.errors import InputError
from difftap.images import load_image, object_numbers, read_labels

__all__ = ["PEOPLE", "STUDY_CLIPS", "TREE", "load", "variants"]

SPLITS = ("train", "val")
TREE: Tree = (
    ("Annotations/*/*/*.png", "palette PNGs, a folder a clip: 480p/walking/00000.png"),
    ("ImageSets/2017/*.txt", "lists of clips: train.txt, val.txt"),
    ("JPEGImages/*/*/*.jpg", "the frames, a folder a clip: 480p/walking/00000.jpg"),
    ("davis_semantics.json", "optional: the class of each object of each clip"),
)
PEOPLE: Mapping[str, tuple[int, ...]] = {
    "boxing-fisheye": (1, 2, 3),
    "dancing": (1, 2, 3),
    "disc-jockey": (1, 2),
    "india": (1, 2, 3),
    "judo": (1, 2),
    "lindy-hop": (1, 2, 3, 4, 5, 6, 7, 8),
    "soapbox": (2, 3),
    "tuk-tuk": (1, 2, 3),
    "walking": (1, 2),
}
"""Clip -> numbers of the objects that are people, from DAVIS 2017's own semantics. Used for folders without
``davis_semantics.json``."""

STUDY_CLIPS = tuple(clip for clip in PEOPLE if clip != "soapbox")
"""The clips of the semantic study."""


def variants(root: Path) -> list[str]:
    """Return the splits whose lists are there."""
    return [name for name in SPLITS if (root / "ImageSets/2017" / f"{name}.txt").is_file()]


def load(
    root: Path,
    *,
    split: str | None = None,
    listing: Sequence[str] | None = None,
    wanted: ObjectFilter = ObjectFilter(),  # noqa: B008 - frozen
    allow_missing: bool = False,
    resolution: str | None = None,
) -> SceneSource:
    """Open DAVIS 2017.

    A scene is a frame that has a mask, named ``clip/00000``. An object has the name ``clip/number`` in all frames of
    its clip. Its class comes from ``davis_semantics.json`` if the folder has that file; otherwise it is ``person`` for
    the objects in `PEOPLE` and ``object`` for the rest.

    Args:
        root: the folder that holds ``JPEGImages``.
        split: ``train`` or ``val``; by default all clips that have masks.
        listing: names of clips instead of a split.
        wanted: which objects.
        allow_missing: leave out listed clips and frames that are missing, and count them.
        resolution: ``480p`` or ``Full-Resolution``; by default the first of these that is there.

    Raises:
        DatasetError: the folder is not laid out like `TREE`, or listed files are missing.
    """
    if split is not None:
        one_of("split", split, SPLITS)
    if resolution is not None:
        one_of("resolution", resolution, ("480p", "Full-Resolution"))
    require_files("davis", root, TREE, root / "JPEGImages", root / "Annotations")
    size = resolution or next(
        (name for name in ("480p", "Full-Resolution") if (root / "Annotations" / name).is_dir()), "480p"
    )
    frames, masks = root / "JPEGImages" / size, root / "Annotations" / size
    require_files("davis", root, TREE, frames, masks)
    if listing is not None:
        clips = list(listing)
    elif split is not None:
        require_files("davis", root, TREE, root / "ImageSets/2017" / f"{split}.txt")
        clips = read_names(root / "ImageSets/2017" / f"{split}.txt")
    else:
        clips = sorted(path.name for path in masks.iterdir() if path.is_dir())
    semantics = _semantics(root)
    keys, missing = [], []
    for clip in clips:
        drawn = sorted(path.stem for path in (masks / clip).glob("*.png"))
        if not drawn:
            missing.append(Problem("missing-annotation", clip, f"there are no masks in '{masks / clip}'", masks / clip))
        for frame in drawn:
            if (frames / clip / f"{frame}.jpg").is_file():
                keys.append(f"{clip}/{frame}")
            else:
                path = frames / clip / f"{frame}.jpg"
                missing.append(Problem("missing-image", f"{clip}/{frame}", f"there is no image '{path}'", path))

    def read(key: str) -> Scene:
        return _scene(frames, masks, key, semantics, wanted)

    about = {
        "split": "list" if listing is not None else split or "all",
        "wanted": wanted.to_dict(),
        "resolution": size,
        "semantics": "davis_semantics.json" if semantics is not None else "built in",
    }
    return make_source("davis", root, keys, read, about, missing, allow_missing=allow_missing)


def _semantics(root: Path) -> dict[str, dict[str, str]] | None:
    """Read the class of each object of each clip: clip -> number -> class; None if the folder has no such file."""
    path = root / "davis_semantics.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {str(clip): {str(k): str(v) for k, v in objects.items()} for clip, objects in data.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"'{path}' cannot be read as classes of objects by clip ({error}); restore it", draw_tree(root, TREE)
        ) from error


def _category(clip: str, number: int, semantics: Mapping[str, Mapping[str, str]] | None) -> str:
    if semantics is None:
        return "person" if number in PEOPLE.get(clip, ()) else "object"
    return semantics.get(clip, {}).get(str(number), "object")


def _scene(
    frames: Path, masks: Path, key: str, semantics: Mapping[str, Mapping[str, str]] | None, wanted: ObjectFilter
) -> Scene:
    """Read one frame and its objects."""
    clip = key.split("/", 1)[0]
    image = load_image(frames / f"{key}.jpg")
    labels = read_labels(masks / f"{key}.png")
    if labels.shape != image.pixels.shape[:2]:
        raise InputError(f"the mask of '{key}' is {labels.shape}, its image {image.pixels.shape[:2]}")
    found = [
        (f"{clip}/{number}", _category(clip, int(number), semantics), np.asarray(labels == number, np.bool_))
        for number in object_numbers(labels)
    ]
    return make_scene(key, image, found, wanted)
