"""Small data sets in each format, as the tests need them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.harness import write_picture


def write_csv(path: Path, header, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


SPAIR_PAIR = {
    "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_imsize": [40, 30, 3], "trg_imsize": [50, 36, 3],
    "src_bndbox": [2, 1, 40, 30], "trg_bndbox": [10, 10, 30, 36], "category": "cat",
    "src_kps": [[3, 4], [5, 6]], "trg_kps": [[11, 12], [45, 35]], "kps_ids": ["0", "7"],
    "mirror": 0, "viewpoint_variation": 2, "scale_variation": 1, "truncation": 3, "occlusion": 0,
}  # fmt: skip


def write_spair(root: Path, pairs: dict[str, dict], split="test", layout="large") -> Path:
    """An SPair-71k of images a (40 x 30) and b (50 x 36) of cats; ``pairs``: name -> what differs from `SPAIR_PAIR`."""
    write_picture(root / "JPEGImages/cat/a.jpg", (40, 30))
    write_picture(root / "JPEGImages/cat/b.jpg", (50, 36))
    annotations = {"a": {"0": [3, 4], "7": [5, 6]}, "b": {"0": [11, 12], "1": None, "5": [20, 21], "7": [45, 35]}}
    for image, keypoints in annotations.items():
        file = root / f"ImageAnnotation/cat/{image}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"kps": keypoints}))
    folder = root / "PairAnnotation" / split
    folder.mkdir(parents=True, exist_ok=True)
    for name, change in pairs.items():
        (folder / f"{name}.json").write_text(json.dumps(SPAIR_PAIR | change))
    listing = root / "Layout" / layout / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(pairs) + "\n")
    return root


def write_mat(path: Path, **arrays) -> Path:
    savemat = pytest.importorskip("scipy.io").savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {name: np.asarray(values, np.float64) for name, values in arrays.items()})
    return path
