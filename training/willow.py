"""PF-WILLOW pairs for the final report. No setting is chosen on them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.pairs import match, pck

ALPHAS = (0.05, 0.10)
EXPECTED_TREE = """expected under {root}:
  pf-willow-half/test_pairs.csv
  pf-willow-half/PF-dataset-WILLOW/<class>/*.png"""


@dataclass(frozen=True)
class WillowPair:
    """Two image paths, and ten corresponding keypoints (10, 2), x and y in pixels of the original images."""

    a: str
    b: str
    points_a: np.ndarray
    points_b: np.ndarray


def read_pairs(root: Path) -> list[WillowPair]:
    """Read all pairs of test_pairs.csv. Raises FileNotFoundError, with the expected tree, if it is missing."""
    path = root / "pf-willow-half" / "test_pairs.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; " + EXPECTED_TREE.format(root=root))
    pairs = []
    with open(path, newline="") as opened:
        for row in csv.DictReader(opened):
            points = [
                np.array([[float(row[f"X{side}{k}"]), float(row[f"Y{side}{k}"])] for k in range(1, 11)])
                for side in "AB"
            ]
            pairs.append(WillowPair(row["imageA"], row["imageB"], *points))
    return pairs


def load_images(root: Path, pairs: list[WillowPair]) -> dict[str, np.ndarray]:
    """Load every image named in `pairs`, (H, W, 3) uint8, by name."""
    out = {}
    for name in sorted({p.a for p in pairs} | {p.b for p in pairs}):
        with Image.open(root / "pf-willow-half" / name) as opened:
            out[name] = np.asarray(opened.convert("RGB"))
    return out


def predict(pair: WillowPair, images: dict[str, np.ndarray], maps: dict[str, torch.Tensor] | None) -> np.ndarray:
    """Predict the keypoints in pixels of image B, (10, 2); without maps, the same relative positions.

    Keypoints have pixel centres at whole numbers, and fractions have pixel edges at 0 and 1; hence the half pixels.
    """
    size_a, size_b = (np.array(images[n].shape[1::-1], float) for n in (pair.a, pair.b))
    fractions = (pair.points_a + 0.5) / size_a
    if maps is not None:
        fractions = match(maps[pair.a], maps[pair.b], fractions)
    return fractions * size_b - 0.5


def benchmark(
    root: Path, extract: Callable[[list[np.ndarray]], list[torch.Tensor]] | None, details: list | None = None
) -> np.ndarray:
    """Measure PCK at ALPHAS over all pairs: the mean of each image's PCK.

    A point is right if its distance is at most alpha times the longer side of the extent of B's keypoints.
    """
    pairs = read_pairs(root)
    images = load_images(root, pairs)
    maps = None if extract is None else dict(zip(images, extract(list(images.values())), strict=True))
    rows = []
    for pair in pairs:
        predicted = predict(pair, images, maps)
        rows.append(pck(predicted, pair.points_b, ALPHAS))
        if details is not None:
            details.append((pair, predicted, rows[-1]))
    return np.mean(rows, 0)
