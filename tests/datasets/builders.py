"""Small data sets in each format, as the tests need them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

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


PALETTE = [value for k in range(256) for value in (k, (k * 7) % 256, (k * 31) % 256)]


def write_labels(path: Path, labels: np.ndarray) -> Path:
    """A palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.fromarray(labels.astype(np.uint8))
    picture.putpalette(PALETTE)
    picture.save(path)
    return path


def block(size=(40, 30), **boxes) -> np.ndarray:
    """Labels ``(H, W)``: ``_3=(x0, y0, x1, y1)`` draws 3 there."""
    labels = np.zeros(size[::-1], np.int64)
    for name, (x0, y0, x1, y1) in boxes.items():
        labels[y0:y1, x0:x1] = int(name[1:])
    return labels


def write_voc(root: Path, images=None, split="trainval") -> Path:
    """A VOC 2012 of 40 x 30 pictures; by default two cats and a person in a, a cat and a dog in b, bordered by void."""
    images = images or {
        "a": ({"_1": (0, 0, 20, 15), "_2": (20, 0, 40, 15), "_3": (0, 20, 40, 30)}, {1: 8, 2: 8, 3: 15}),
        "b": ({"_1": (0, 0, 20, 30), "_2": (22, 0, 40, 30)}, {1: 8, 2: 12}),
    }
    for k, (name, (boxes, classes)) in enumerate(images.items()):
        write_picture(root / "JPEGImages" / f"{name}.jpg", (40, 30), seed=k)
        objects = block(**boxes)
        labels = np.zeros_like(objects)
        for number, label in classes.items():
            labels[objects == number] = label
        edge = np.zeros(objects.shape, np.bool_)
        for number in classes:
            mask = np.pad(objects == number, 1, mode="edge")
            inner = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
            edge |= mask[1:-1, 1:-1] & ~inner
        objects[edge] = labels[edge] = 255
        write_labels(root / "SegmentationObject" / f"{name}.png", objects)
        write_labels(root / "SegmentationClass" / f"{name}.png", labels)
    listing = root / "ImageSets/Segmentation" / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(images) + "\n")
    return root


def write_coco(root: Path, annotations=None, split="val2017") -> Path:
    """A COCO 2017 of two 40 x 30 pictures; ``annotations`` replace the default ones."""
    names = {1: "person", 3: "car", 64: "potted plant", 88: "teddy bear"}
    for k in (1, 2):
        write_picture(root / split / f"{k:012d}.jpg", (40, 30), seed=k)
    if annotations is None:
        annotations = [
            # two parts of one object, as occlusion makes them
            {"image_id": 1, "category_id": 1, "iscrowd": 0,
             "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10], [20, 0, 30, 0, 30, 10, 20, 10]]},
            {"image_id": 1, "category_id": 64, "iscrowd": 0, "segmentation": [[0, 20, 40, 20, 40, 30, 0, 30]]},
            # columns first: 600 pixels without, 300 with, 300 without
            {"image_id": 1, "category_id": 1, "iscrowd": 1,
             "segmentation": {"counts": [600, 300, 300], "size": [30, 40]}},
            {"image_id": 2, "category_id": 3, "iscrowd": 0,
             "segmentation": {"counts": [0, 300, 900], "size": [30, 40]}},
            {"image_id": 2, "category_id": 88, "iscrowd": 0, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
        ]  # fmt: skip
    full = [{"id": 100 + k, "area": 1.0, "bbox": [0, 0, 1, 1], **one} for k, one in enumerate(annotations)]
    data = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "width": 40, "height": 30} for k in (1, 2)],
        "annotations": full,
        "categories": [{"id": k, "name": name} for k, name in names.items()],
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return root


def write_davis(root: Path, clips=None) -> Path:
    """A DAVIS 2017 of 40 x 30 frames; by default three frames of walking, two people, and one of a bear."""
    walk = [{"_1": (k, 0, k + 15, 30), "_2": (22, 0, 38, 30)} for k in range(3)]
    clips = clips or {"walking": walk, "bear": [{"_1": (0, 0, 20, 20)}]}
    for clip, frames in clips.items():
        for k, boxes in enumerate(frames):
            write_picture(root / "JPEGImages/480p" / clip / f"{k:05d}.jpg", (40, 30), seed=k)
            write_labels(root / "Annotations/480p" / clip / f"{k:05d}.png", block(**boxes))
    listing = root / "ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(clips) + "\n")
    return root


def write_folder(root: Path) -> Path:
    """Pictures and masks of one's own: two cups in a folder, one thing at the top."""
    write_picture(root / "images/cup/a.png", (40, 30))
    write_picture(root / "images/b.jpg", (40, 30))
    write_labels(root / "masks/cup/a.png", block(_1=(0, 0, 20, 20), _2=(20, 0, 40, 20)))
    write_labels(root / "masks/b.png", block(_1=(0, 0, 30, 30), _255=(30, 0, 40, 30)))
    return root
