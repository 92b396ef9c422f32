"""Scenes: an image with the masks of its objects, and where they come from.

Axis letters: K objects; H W image pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difftap.errors import InputError
from difftap.images import Image

__all__ = ["Mask", "Scene", "SceneObject", "Selection", "Source", "make_scene", "mask_boxes"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        instance: its identity: the same in every scene that shows the same object.
        category: its class.
        area: pixels of its mask as a fraction of the image's.
    """

    instance: str
    category: str
    area: float


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and the objects in it that are wanted.

    Attributes:
        key: the image's name in its data set.
        image: the picture.
        objects: K objects.
        masks: bool, ``(K, H, W)``.
        left_out: how many objects are annotated but not wanted, by reason.
    """

    key: str
    image: Image
    objects: tuple[SceneObject, ...]
    masks: Mask
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width, height = self.image.size
        if self.masks.shape != (len(self.objects), height, width) or self.masks.dtype != np.bool_:
            raise InputError(
                f"masks of '{self.key}' are {self.masks.dtype} {self.masks.shape}; allowed: bool "
                f"({len(self.objects)}, {height}, {width}), one a object, as large as the image"
            )


@dataclass(frozen=True)
class Selection:
    """Which objects are wanted.

    Attributes:
        min_area: an object must cover more than this fraction of the image (the study: 0.01).
        classes: the classes wanted; None for all.
    """

    min_area: float = 0.01
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < 1:
            raise InputError(f"min-area is {self.min_area}; allowed: a fraction of the image, 0 to below 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for provenance."""
        return {"min_area": self.min_area, "classes": None if self.classes is None else sorted(self.classes)}


@dataclass(frozen=True)
class Source:
    """Scenes that are read one at a time.

    Attributes:
        name: of the data set.
        keys: the scenes' names, in order.
        read: a scene by its name; raises InputError if it cannot be used.
        about: what decides the scenes, as plain data: part of the provenance of what is made from them.
        missing: images that are listed but not there: name, kind of problem, what is wrong.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[str], Scene]
    about: Mapping[str, Any]
    missing: tuple[tuple[str, str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def mask_boxes(masks: Mask) -> NDArray[np.int32]:
    """The tightest box around each mask of ``(K, H, W)``: ``(K, 4)``, x0, y0, x1, y1 in pixels, ends excluded.

    An empty mask's is all zeros.
    """
    found = np.zeros((len(masks), 4), np.int32)
    for box, mask in zip(found, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


def make_scene(
    key: str,
    image: Image,
    found: Sequence[tuple[str, str, Mask]],
    wanted: Selection,
    left_out: Mapping[str, int] | None = None,
) -> Scene:
    """A scene of the objects that are wanted; the others are counted.

    Args:
        key: the scene's name.
        image: the picture.
        found: per annotated object its identity, its class and its mask ``(H, W)``.
        wanted: which to keep.
        left_out: objects that the caller left out already, by reason.
    """
    counts = dict(left_out or {})
    objects, masks = [], []
    pixels = image.size[0] * image.size[1]
    for instance, category, mask in found:
        area = float(np.count_nonzero(mask)) / pixels
        reason = None
        if wanted.classes is not None and category not in wanted.classes:
            reason = "class not wanted"
        elif area == 0:
            reason = "empty mask"
        elif area <= wanted.min_area:
            reason = "too small an area"
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
            continue
        objects.append(SceneObject(instance, category, area))
        masks.append(mask)
    height, width = image.pixels.shape[:2]
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.bool_)
    return Scene(key, image, tuple(objects), stacked, counts)
