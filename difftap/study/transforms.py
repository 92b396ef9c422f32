"""The study's transforms: the same object in an image that was cropped, shifted, flipped or turned.

The paper names the transforms and does not define them; what they do here is our reading, said in docs/semantics.md.
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

_GREY = 127
_MARK = "#"

Pixels = NDArray[np.uint8]
Whole = Callable[[NDArray[np.generic]], NDArray[np.generic]]

WHOLE_TRANSFORMS: dict[str, Whole] = {
    "flip horizontal": lambda array: array[:, ::-1],
    "flip vertical": lambda array: array[::-1],
    "rotate 90": lambda array: np.rot90(array, 1),
    "rotate 180": lambda array: np.rot90(array, 2),
    "rotate 270": lambda array: np.rot90(array, 3),
}
"""Of the whole image, once for all its objects; turns are counter-clockwise, in degrees."""

OBJECT_TRANSFORMS: dict[str, Callable[[Pixels, Mask], tuple[Pixels, Mask]]] = {
    "crop-pad": lambda pixels, mask: _crop_pad(pixels, mask),
    "crop-resize": lambda pixels, mask: _window(pixels, mask, 0.0),
    "crop-shift 20 %": lambda pixels, mask: _window(pixels, mask, 0.2),
    "crop-shift 40 %": lambda pixels, mask: _window(pixels, mask, 0.4),
    "crop-shift 60 %": lambda pixels, mask: _window(pixels, mask, 0.6),
}
"""Of the image around one object, once an object."""

TRANSFORMS = (*OBJECT_TRANSFORMS, *WHOLE_TRANSFORMS)


def _crop_pad(pixels: Pixels, mask: Mask) -> tuple[Pixels, Mask]:
    """Draw the object's box where it was, mid-grey around it."""
    x0, y0, x1, y1 = mask_boxes(mask[None])[0].tolist()
    padded = np.full_like(pixels, _GREY)
    padded[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    return padded, mask


def _window(pixels: Pixels, mask: Mask, share: float) -> tuple[Pixels, Mask]:
    """Draw the object's box alone, moved sideways by a share of its width to the side where the image has more room.

    What of the box the move leaves behind is lost; where the image ends, mid-grey follows. The network's input then
    is the window, so that it is seen larger.
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
    """Which transform a scene of `transformed` shows."""
    return key.split(_MARK)[1]


def transformed(source: SceneSource) -> SceneSource:
    """Every scene under every transform; objects keep their identity, the image gets a name of its own.

    The scenes of one image follow one another, so that it is decoded once.
    """
    read = lru_cache(maxsize=1)(source.read)
    keys = []
    for key in source.keys:
        try:
            count = len(read(key).objects)
        except ValueError:  # an InputError: it fails once more when its scenes are read, and is recorded there
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
        return make_scene(name, image, found, ObjectFilter(min_area=0.0))

    return SceneSource(source.name, tuple(keys), made, {**source.about, "transforms": list(TRANSFORMS)}, source.missing)
