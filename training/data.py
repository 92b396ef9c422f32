"""Training photographs: list, uint8 cache, hold-out split, augmentation.

Layout expected below the data root:

    train/caltech101/<class folder>/*.jpg
    train/imagenet_sample/<wnid>_<class name>.jpg

Axis letters: B batch, H W image pixels. Boxes are (x0, y0, x1, y1) as fractions of the whole image.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Config = dict[str, Any]
"""The configuration file (pocket.toml) as it was read, or one section of it."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
EXPECTED_TREE = """expected under {root}:
  train/caltech101/<class>/*.jpg
  train/imagenet_sample/<wnid>_<class name>.jpg"""


@dataclass(frozen=True)
class Item:
    """One photograph: its path relative to the data root, its source set, and its caption words, lower-case."""

    path: str
    source: str
    words: str


def words_of(name: str) -> str:
    """Turn a class name into caption words: lower-case, with spaces for punctuation.

    >>> words_of("Faces_easy")
    'faces easy'
    """
    kept = "".join(c if c.isalnum() else " " for c in name.lower())
    return " ".join(kept.split())


def list_items(root: Path) -> list[Item]:
    """List all training photographs below `root`, in a fixed order.

    Raises FileNotFoundError, with the expected tree, if there are none.
    """
    items: list[Item] = []
    for source in ("caltech101", "imagenet_sample"):
        base = root / "train" / source
        if not base.is_dir():
            raise FileNotFoundError(f"no folder {base}; " + EXPECTED_TREE.format(root=root))
        for path in sorted(base.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            rel = path.relative_to(root).as_posix()
            if source == "caltech101":
                name = path.parent.name
                words = "" if name == "BACKGROUND_Google" else words_of(name)
            else:
                words = words_of(path.stem.split("_", 1)[1])
            items.append(Item(rel, source, words))
    if not items:
        raise FileNotFoundError("no images; " + EXPECTED_TREE.format(root=root))
    return items


def is_held_out(item: Item, one_in: int) -> bool:
    """Tell whether a photograph is kept for validation. It depends only on the path, so the split never changes."""
    digest = hashlib.sha1(item.path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % one_in == 0


class ImageCache:
    """All photographs, decoded once into one flat uint8 file (memory-mapped), with their own aspect ratio.

    Photographs are made smaller so that their shorter side has at most `max_short_side` pixels. The cache is built
    again when the list of files or this limit changes.
    """

    def __init__(self, root: Path, folder: Path, max_short_side: int = 224) -> None:
        self.items = list_items(root)
        stamp = hashlib.sha1(json.dumps([[i.path for i in self.items], max_short_side]).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        self._data_path, meta_path = folder / "images.u8", folder / "images.json"
        if not (meta_path.exists() and json.loads(meta_path.read_text())["stamp"] == stamp):
            self._build(root, meta_path, stamp, max_short_side)
        meta = json.loads(meta_path.read_text())
        self.shapes: list[tuple[int, int]] = [tuple(s) for s in meta["shapes"]]
        sizes = np.array([h * w * 3 for h, w in self.shapes], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._data = np.memmap(self._data_path, np.uint8, "r")

    def _build(self, root: Path, meta_path: Path, stamp: str, max_short_side: int) -> None:
        shapes = []
        partial = self._data_path.with_suffix(".partial")
        with open(partial, "wb") as out:
            for item in self.items:
                with Image.open(root / item.path) as opened:
                    image = opened.convert("RGB")
                scale = max_short_side / min(image.size)
                if scale < 1:
                    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
                out.write(np.asarray(image).tobytes())
                shapes.append((image.height, image.width))
        os.replace(partial, self._data_path)
        # Last: a build that was killed leaves no description, and is done again.
        meta_path.write_text(json.dumps({"stamp": stamp, "shapes": shapes}))

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> np.ndarray:
        """Give photograph `index`, (H, W, 3) uint8, as a view into the cache."""
        h, w = self.shapes[index]
        start = self._offsets[index]
        return self._data[start : start + h * w * 3].reshape(h, w, 3)

    def whole(self, index: int, size: int) -> np.ndarray:
        """Give a photograph stretched to a square, (size, size, 3) uint8."""
        return np.asarray(Image.fromarray(self.image(index)).resize((size, size), Image.BICUBIC))


def random_box(rng: np.random.Generator, min_area: float, max_stretch: float, whole_share: float) -> np.ndarray:
    """Draw a random crop as fractions (x0, y0, x1, y1); the whole image with probability `whole_share`."""
    if rng.random() < whole_share:
        return np.array([0.0, 0.0, 1.0, 1.0], np.float32)
    area = rng.uniform(min_area, 1.0)
    stretch = np.exp(rng.uniform(-1, 1) * np.log(max_stretch))
    w, h = min(1.0, np.sqrt(area * stretch)), min(1.0, np.sqrt(area / stretch))
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return np.array([x, y, x + w, y + h], np.float32)


def crop(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Crop `box` (fractions) of (H, W, 3) uint8 and stretch it to (size, size, 3) uint8."""
    h, w = image.shape[:2]
    pixels = (float(box[0]) * w, float(box[1]) * h, float(box[2]) * w, float(box[3]) * h)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC, box=pixels))


def jitter(rng: np.random.Generator, batch: np.ndarray, strength: float) -> np.ndarray:
    """Change brightness, contrast, saturation and tint of each image. (B, H, W, 3) float32 in [-1, 1], in and out."""
    b = len(batch)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-strength, strength, shape).astype(np.float32)

    gray = batch.mean(-1, keepdims=True)
    out = gray + (batch - gray) * (1 + draw(b, 1, 1, 1))
    mean = out.mean((1, 2, 3), keepdims=True)
    out = mean + (out - mean) * (1 + draw(b, 1, 1, 1))
    out = out + 0.5 * draw(b, 1, 1, 1) + 0.25 * draw(b, 1, 1, 3)
    return np.clip(out, -1, 1)
