"""The study's transforms: the same object in an image that was cropped, shifted, flipped or rotated.

The paper names the transforms but does not define them. Ours are our reading; docs/semantics.md describes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from difftap.datasets.objects import Mask, mask_boxes
from difftap.images import Image
from difftap.prototypes import ObjectFilter, Scene, SceneSource, make_scene

__all__ = ["OBJECT_TRANSFORMS", "TRANSFORMS", "WHOLE_TRANSFORMS", "transform_of", "transformed"]

_GREY = 127  # fills what lies outside the image
_MARK = "#"  # separates the parts of a scene's name: image, transform, number of the object

Pixels = NDArray[np.uint8]
Whole = Callable[[NDArray[np.generic]], NDArray[np.generic]]

WHOLE_TRANSFORMS: dict[str, Whole] = {
    "flip horizontal": lambda array: array[:, ::-1],
    "flip vertical": lambda array: array[::-1],
    "rotate 90": lambda array: np.rot90(array, 1),
    "rotate 180": lambda array: np.rot90(array, 2),
    "rotate 270": lambda array: np.rot90(array, 3),
}
"""Transforms of the whole image, applied once for all its objects; rotations are counter-clockwise, in degrees."""

OBJECT_TRANSFORMS: dict[str, Callable[[Pixels, Mask], tuple[Pixels, Mask]]] = {
    "crop-pad": lambda pixels, mask: _crop_pad(pixels, mask),
    "crop-resize": lambda pixels, mask: _window(pixels, mask, 0.0),
    "crop-shift 20 %": lambda pixels, mask: _window(pixels, mask, 0.2),
    "crop-shift 40 %": lambda pixels, mask: _window(pixels, mask, 0.4),
    "crop-shift 60 %": lambda pixels, mask: _window(pixels, mask, 0.6),
}
"""Transforms of the image around one object, applied once per object."""

TRANSFORMS = (*OBJECT_TRANSFORMS, *WHOLE_TRANSFORMS)


def _crop_pad(pixels: Pixels, mask: Mask) -> tuple[Pixels, Mask]:
    """Keep the object's box in its place and fill the rest of the image with mid-grey."""
    x0, y0, x1, y1 = mask_boxes(mask[None])[0].tolist()
    padded = np.full_like(pixels, _GREY)
    padded[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    return padded, mask


def _window(pixels: Pixels, mask: Mask, share: float) -> tuple[Pixels, Mask]:
    """Cut out a window as large as the object's box, moved sideways by a share of the box's width.

    It moves to the side where the image has more room. The part of the object that is then outside is lost; beyond the
    image, the window is mid-grey. The window becomes the network's whole input, so the object appears larger.
    """
    x0, y0, x1, y1 = mask_boxes(mask[None])[0].tolist()
    move = round(share * (x1 - x0))
    move = move if mask.shape[1] - x1 >= x0 else -move
    left, right = x0 + move, x1 + move
    cut = np.full((y1 - y0, right - left, 3), _GREY, np.uint8)
    shown = np.zeros(cut.shape[:2], np.bool_)
    a, b = max(left, 0), min(right, mask.shape[1])
    cut[:, a - left : b - left] = pixels[y0:y1, a:b]
    shown[:, a - left : b - left] = mask[y0:y1, a:b]
    return cut, shown


def transform_of(key: str) -> str:
    """Give the transform that a scene of `transformed` shows, from the scene's name."""
    return key.split(_MARK)[1]


def transformed(source: SceneSource) -> SceneSource:
    """Give every scene under every transform. Objects keep their identity; each transformed image has its own name.

    The scenes of one image follow one another, so that it is decoded only once.
    """
    read = lru_cache(maxsize=1)(source.read)
    keys = []
    for key in source.keys:
        try:
            count = len(read(key).objects)
        except ValueError:  # an InputError; it comes again when the scenes are read, and is recorded then
            count = 1
        keys += [f"{key}{_MARK}{name}" for name in WHOLE_TRANSFORMS] if count else []
        keys += [f"{key}{_MARK}{name}{_MARK}{k}" for name in OBJECT_TRANSFORMS for k in range(count)]

    def made(name: str) -> Scene:
        key, kind, *which = name.split(_MARK)
        scene = read(key)
        if not which:
            turn = WHOLE_TRANSFORMS[kind]
            pixels = np.ascontiguousarray(turn(scene.image.pixels))
            masks = [np.ascontiguousarray(turn(mask)) for mask in scene.masks]
            objects = scene.objects
        else:
            k = int(which[0])
            cut, mask = OBJECT_TRANSFORMS[kind](scene.image.pixels, scene.masks[k])
            pixels, masks, objects = cut, [mask], scene.objects[k : k + 1]
        image = Image(pixels.astype(np.uint8, copy=False), f"{scene.image.path} ({kind})")
        found = [
            (one.instance, one.category, np.asarray(mask, np.bool_)) for one, mask in zip(objects, masks, strict=True)
        ]
        # No least area: the source's filter has chosen the objects, and a transform must not drop one.
        return make_scene(name, image, found, ObjectFilter(min_area=0.0))

    return SceneSource(source.name, tuple(keys), made, {**source.about, "transforms": list(TRANSFORMS)}, source.missing)
