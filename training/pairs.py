"""Make validation pairs from held-out training photographs; match them densely and measure PCK.

There are three kinds of pairs; none uses an image of a benchmark:
  warp     one photograph and a copy with a changed perspective and colour. The ground truth is exact.
  aligned  two photographs of one class whose objects have the same pose in Caltech-101 (faces, motorbikes, airplanes,
           cars from the side, leopards), each with its own random crop. The ground truth is "the same place in the
           uncropped image". It is right within a few per cent of the image, so read PCK at 0.10. The answer "the same
           relative position" does well on these.
  class    any two photographs of one class. The "truth" is the teacher's match, at points where matching there and
           back returns to the start. It measures how like the teacher the model is.

Points are (x, y) fractions of the image, from 0 to 1 at the outer pixel edges. Letters: N points, C channels, h w
cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from training.data import ImageCache, crop, is_held_out, jitter, random_box

if TYPE_CHECKING:
    from training.teacher import TargetCache

ALIGNED = ("Faces_easy", "Motorbikes", "airplanes", "car_side", "Leopards")


@dataclass(frozen=True)
class Pair:
    """Two images (H, W, 3) uint8, and their corresponding points (N, 2) as fractions."""

    kind: str
    a: np.ndarray
    b: np.ndarray
    points_a: np.ndarray
    points_b: np.ndarray


def held_out_indices(cache: ImageCache, one_in: int) -> list[int]:
    """List the indices of the photographs never trained on."""
    return [i for i, item in enumerate(cache.items) if is_held_out(item, one_in)]


def grid(count: int, low: float, high: float) -> np.ndarray:
    """Make points (count * count, 2) on a regular grid."""
    axis = np.linspace(low, high, count, dtype=np.float64)
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def homography(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Compute the 3 x 3 homography that maps four points `src` to `dst`, both (4, 2)."""
    rows = []
    for (x, y), (u, v) in zip(src, dst, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solution = np.linalg.solve(np.array(rows), dst.reshape(-1))
    return np.append(solution, 1.0).reshape(3, 3)


def apply_homography(h: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (N, 2) by a homography."""
    out = np.concatenate([points, np.ones((len(points), 1))], 1) @ h.T
    return out[:, :2] / out[:, 2:]


def warp_pair(rng: np.random.Generator, image: np.ndarray, size: int) -> Pair:
    """Pair a photograph with a copy whose perspective and colours are changed."""
    base = crop(image, np.array([0, 0, 1, 1]), size)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    centre = rng.uniform(0.4, 0.6, 2)
    scale, angle = np.exp(rng.uniform(-0.35, 0.35)), rng.uniform(-0.3, 0.3)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (corners - 0.5) @ turn.T + centre + rng.uniform(-0.1, 0.1, (4, 2))
    forward = homography(corners, moved)
    # PIL wants the map from output pixels to input pixels.
    pixel = np.diag([size, size, 1.0])
    inverse = pixel @ np.linalg.inv(forward) @ np.linalg.inv(pixel)
    inverse /= inverse[2, 2]
    warped = Image.fromarray(base).transform((size, size), Image.PERSPECTIVE, inverse.reshape(-1)[:8], Image.BICUBIC)
    changed = jitter(rng, np.asarray(warped, np.float32)[None] / 127.5 - 1, 0.3)[0]
    points = grid(7, 0.1, 0.9)
    target = apply_homography(forward, points)
    inside = ((target > 0.03) & (target < 0.97)).all(1)
    return Pair("warp", base, ((changed + 1) * 127.5).astype(np.uint8), points[inside], target[inside])


def aligned_pair(rng: np.random.Generator, first: np.ndarray, second: np.ndarray, size: int) -> Pair:
    """Pair two photographs of objects with the same pose, each with its own random crop."""
    boxes = [random_box(rng, 0.55, 1.3, 0.2) for _ in range(2)]
    points = grid(7, 0.15, 0.85)
    views = [(points - box[:2]) / (box[2:] - box[:2]) for box in boxes]
    inside = np.all([((v > 0.03) & (v < 0.97)).all(1) for v in views], axis=0)
    images = [crop(i, b, size) for i, b in zip((first, second), boxes, strict=True)]
    return Pair("aligned", images[0], images[1], views[0][inside], views[1][inside])


def class_pairs(cache: ImageCache, targets: TargetCache, one_in: int, count: int, size: int, seed: int) -> list[Pair]:
    """Make pairs of kind "class" from held-out photographs.

    Each has at least eight points; at most `count` / 10 are of the same class.
    """
    rng = np.random.default_rng(seed)
    classes: dict[str, list[int]] = {}
    for i in held_out_indices(cache, one_in):
        if cache.items[i].words and cache.items[i].source == "caltech101":
            classes.setdefault(cache.items[i].words, []).append(i)
    found = [(i, j) for members in classes.values() for i in members for j in members if i != j]
    out: list[Pair] = []
    used: dict[str, int] = {}
    for n in rng.permutation(len(found)):
        i, j = found[n]
        name = cache.items[i].words
        if used.get(name, 0) >= max(1, count // 10):
            continue
        maps = targets.get(np.array([i, j]), np.zeros(2))
        points = grid(7, 0.1, 0.9)
        there = match(maps[0], maps[1], points)
        back = match(maps[1], maps[0], there)
        kept = np.linalg.norm(back - points, axis=1) < 0.04
        if kept.sum() >= 8:
            used[name] = used.get(name, 0) + 1
            out.append(Pair("class", cache.whole(i, size), cache.whole(j, size), points[kept], there[kept]))
        if len(out) == count:
            break
    return out


def validation_pairs(
    cache: ImageCache, one_in: int, count: int, size: int, seed: int = 7, targets: TargetCache | None = None
) -> list[Pair]:
    """Make about `count` pairs of each kind from held-out photographs, the same ones in every call.

    Pairs with fewer than eight points are left out. Kind "class" needs `targets`.
    """
    rng = np.random.default_rng(seed)
    held = held_out_indices(cache, one_in)
    pairs = []
    for index in rng.permutation(held)[:count]:
        pair = warp_pair(rng, cache.image(index), size)
        if len(pair.points_a) >= 8:
            pairs.append(pair)
    for n in range(count):
        name = ALIGNED[n % len(ALIGNED)]
        members = [i for i in held if cache.items[i].path.split("/")[-2] == name]
        i, j = rng.choice(members, 2, replace=False)
        pair = aligned_pair(rng, cache.image(i), cache.image(j), size)
        if len(pair.points_a) >= 8:
            pairs.append(pair)
    return pairs + (class_pairs(cache, targets, one_in, count, size, seed) if targets else [])


def match(map_a: torch.Tensor, map_b: torch.Tensor, points: np.ndarray, steps: int = 64) -> np.ndarray:
    """Find the place in B with the highest cosine for each point of A, (N, 2) fractions.

    The maps (C, h, w) are interpolated bilinearly; B is searched at the places of a `steps` x `steps` grid.
    """
    where = torch.from_numpy(points).to(map_a)[None, None] * 2 - 1  # (1, 1, N, 2)
    source = F.grid_sample(map_a[None], where, align_corners=False, padding_mode="border")[0, :, 0]  # (C, N)
    dense = F.interpolate(map_b[None], (steps, steps), mode="bilinear", align_corners=False)[0].flatten(1)
    similarity = F.normalize(source, dim=0).T @ F.normalize(dense, dim=0)  # (N, steps * steps)
    best = similarity.argmax(1).cpu().numpy()
    return np.stack([best % steps + 0.5, best // steps + 0.5], 1) / steps


def pck(
    predicted: np.ndarray, truth: np.ndarray, alphas: Sequence[float], scale: np.ndarray | None = None
) -> np.ndarray:
    """Compute the share of points within alpha times the longer side of the truth's extent (`<=`), for one image.

    `scale` (2,) turns fractions into pixels (width, height), for images that are not square. Returns (len(alphas),)
    fractions.
    """
    scale = np.ones(2) if scale is None else scale
    extent = ((truth.max(0) - truth.min(0)) * scale).max()
    distance = np.linalg.norm((predicted - truth) * scale, axis=1)
    return np.array([(distance <= alpha * extent).mean() for alpha in alphas])


Extract = Callable[[list[np.ndarray]], list[torch.Tensor]]


def score(pairs: list[Pair], extract: Extract, alphas: Sequence[float] = (0.05, 0.10)) -> dict[str, np.ndarray]:
    """Compute the mean PCK of each kind. `extract` turns images (H, W, 3) uint8 into maps (C, h, w)."""
    maps = extract([p.a for p in pairs] + [p.b for p in pairs])
    found: dict[str, list[np.ndarray]] = {}
    for n, pair in enumerate(pairs):
        predicted = match(maps[n], maps[len(pairs) + n], pair.points_a)
        found.setdefault(pair.kind, []).append(pck(predicted, pair.points_b, alphas))
    return {kind: np.mean(rows, 0) for kind, rows in found.items()}
