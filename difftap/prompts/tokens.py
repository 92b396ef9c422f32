"""Image tokens: the description of an image that conditional prompts are made from.

``own`` tokens are the model's own features at one tap, with one noise sample and an empty prompt, averaged to a grid of
at most 16 x 16 and normalised per token. ``dinov2`` tokens are the patch tokens of a DINOv2 network.

Axis letters: N tokens; C channels; h w cells.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PIL

from difftap.artifacts.files import JsonObject
from difftap.coords import Size
from difftap.images import Image

__all__ = ["MAX_SIDE", "TokenSource", "dino_input", "own_grid", "own_tokens"]

MAX_SIDE = 16
"""Most own tokens on a side of the grid."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained


@dataclass(frozen=True)
class TokenSource:
    """Where image tokens come from.

    Attributes:
        kind: ``own`` or ``dinov2``.
        count: N.
        channels: C.
        tap: name of the tap, for ``own`` tokens.
        timestep: for ``own`` tokens.
        grid: ``(w, h)`` of ``own`` tokens.
        network: folder or hub id of the DINOv2 network.
        weights: hash of its weights and configuration.
        side: side of its square input, in pixels.
        fit: how an image comes into the DINOv2 network: ``crop`` or ``stretch`` (`dino_input`). Prompt files of difftap
            0.1.0 do not say, and were learned on stretched images.
    """

    kind: str
    count: int
    channels: int
    tap: str = ""
    timestep: int = 0
    grid: Size = (0, 0)
    network: str = ""
    weights: str = ""
    side: int = 0
    fit: str = "stretch"

    def to_dict(self) -> JsonObject:
        """Give plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: JsonObject) -> TokenSource:
        """Build from plain data."""
        return cls(**{**data, "grid": tuple(data["grid"])})


def own_grid(size: Size, stride: int) -> Size:
    """Compute the grid ``(w, h)`` of own tokens from the input's size and the tap's stride, both in pixels."""
    return min(MAX_SIDE, size[0] // stride), min(MAX_SIDE, size[1] // stride)


def own_tokens(data: NDArray[np.float32], grid: Size) -> NDArray[np.float32]:
    """Turn a map ``(C, h, w)`` into tokens ``(N, C)``, row by row, each with mean 0 and variance 1.

    Cells are averaged adaptively, as in torch: bin i of n over a side of s cells is [floor(i s / n),
    ceil((i + 1) s / n)).
    """
    pooled = _averaged(_averaged(data.astype(np.float64), grid[1], 1), grid[0], 2)
    tokens = pooled.reshape(len(data), -1).T
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.mean(np.square(centred), axis=1, keepdims=True) + 1e-12)  # not 0 for a constant token
    return np.ascontiguousarray(centred / spread, np.float32)


def _averaged(data: NDArray[np.float64], count: int, axis: int) -> NDArray[np.float64]:
    """Average along an axis to ``count`` bins."""
    length = data.shape[axis]
    bins = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    return np.stack([data.take(range(*one), axis).mean(axis) for one in bins], axis)


def dino_input(image: Image, side: int, fit: str = "crop") -> NDArray[np.float32]:
    """Bring an image into a DINOv2 network's square input, and normalise it as the network wants it.

    Args:
        image: the image.
        side: of the input, in pixels.
        fit: ``crop``: the shorter edge becomes 8/7 of the side, and the middle is cut out (SD4Match: 256 and 224);
            ``stretch``: the whole image is stretched to the square.

    Returns:
        float32 ``(3, side, side)``.
    """
    picture = PIL.fromarray(image.pixels)
    if fit == "stretch":
        resized = picture.resize((side, side), PIL.Resampling.BICUBIC)
    else:
        edge = round(side * 256 / 224)
        scale = edge / min(picture.size)
        width, height = (max(edge, int(length * scale)) for length in picture.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        resized = picture.resize((width, height), PIL.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    values = (np.asarray(resized, np.float32) / 255.0 - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)
