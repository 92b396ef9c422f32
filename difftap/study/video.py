"""Follow people through later frames: distances by offset, and whether a person stays nearest to itself.

Axis letters: N objects of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import JsonObject
from difftap.artifacts.table import plain
from difftap.errors import InputError
from difftap.prototypes import PrototypeTable
from difftap.retrieval.distances import pairwise
from difftap.study.statistics import DistanceSet, Interval, bootstrap_means, box_figures

__all__ = ["Clip", "clips", "offset_results"]


@dataclass(frozen=True, eq=False)
class Clip:
    """The N objects of one clip, seen in its frames, with all their distances.

    Attributes:
        name: the clip's name.
        frames: ``(N,)``, frame number of each object.
        images: ``(N,)``, index of the frame among all frames of all clips.
        instances: ``(N,)`` str, identity of each object.
        distances: ``(N, N)``, distances between prototypes.
    """

    name: str
    frames: NDArray[np.int64]
    images: NDArray[np.int64]
    instances: NDArray[np.str_]
    distances: NDArray[np.float32]


def clips(table: PrototypeTable, metric: str, device: str = "cpu") -> list[Clip]:
    """Split a table of prototypes into clips and compute their distances; images are named ``clip/00012``.

    Raises:
        InputError: an image has another kind of name.
    """
    owners = []
    for key in table.images:
        clip, _, frame = str(key).rpartition("/")
        if not clip or not frame.isdecimal():
            raise InputError(f"'{key}' is no frame of a clip; allowed: names such as walking/00012")
        owners.append((clip, int(frame)))
    names = np.array([clip for clip, _ in owners], np.str_)
    frames = np.array([frame for _, frame in owners], np.int64)
    images = np.unique(table.images, return_inverse=True)[1].ravel().astype(np.int64)
    found = []
    for name in np.unique(names):
        mine = np.flatnonzero(names == name)
        distances = pairwise(table.vectors[mine], metric=metric, device=device)
        found.append(Clip(str(name), frames[mine], images[mine], table.instances[mine], distances))
    return found


def _pairs(clip: Clip, offset: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the objects of every two frames with this offset, every pair once; give the rows of both."""
    # Offset 0 pairs a frame with itself, where each pair would come twice.
    later = clip.frames[None, :] - clip.frames[:, None] == offset
    i, j = np.nonzero(np.triu(later, 1) if offset == 0 else later)
    return i.astype(np.int64), j.astype(np.int64)


def _set(parts: Sequence[tuple[Clip, NDArray[np.int64], NDArray[np.int64]]]) -> DistanceSet:
    values = np.concatenate([clip.distances[i, j] for clip, i, j in parts]).astype(np.float64)
    left = np.concatenate([clip.images[i] for clip, i, _ in parts])
    right = np.concatenate([clip.images[j] for clip, _, j in parts])
    return DistanceSet(values, left, right)


def offset_results(found: Sequence[Clip], offsets: Sequence[int], *, draws: int = 1000, seed: int = 0) -> JsonObject:
    """Describe the distances at each offset.

    Returns:
        ``scsi``: two people in one frame; ``offsets``: for each offset ``sidi`` (the same person that many frames
        later), ``scdi`` (another person of the clip, that many frames later), whether sidi < scdi holds and in which
        share of bootstrap draws, and ``nearest`` (how often the nearest person in a later frame with several people is
        the same one); ``clips``: frames, people and prototypes of each clip.
    """
    together = _set([(clip, *_pairs(clip, 0)) for clip in found])
    rows = []
    for offset in offsets:
        own, other = [], []
        for clip in found:
            i, j = _pairs(clip, offset)
            same = clip.instances[i] == clip.instances[j]
            own.append((clip, i[same], j[same]))
            other.append((clip, i[~same], j[~same]))
        sets = {"sidi": _set(own), "scdi": _set(other)}
        boot = bootstrap_means(sets, draws=draws, seed=seed)
        both = all(len(one) for one in sets.values())
        rows.append(
            {
                "offset": offset,
                **{name: _described(one, boot.means[name]) for name, one in sets.items()},
                "holds": bool(sets["sidi"].values.mean() < sets["scdi"].values.mean()) if both else None,
                "share_of_draws": boot.trend,
                "nearest": _nearest(found, offset),
            }
        )
    described = {
        clip.name: {
            "frames": len(set(clip.frames.tolist())),
            "people": sorted(set(clip.instances.tolist())),
            "prototypes": len(clip.frames),
        }
        for clip in found
    }
    alone = bootstrap_means({"scsi": together}, draws=draws, seed=seed).means["scsi"]
    made: JsonObject = plain({"scsi": _described(together, alone), "offsets": rows, "clips": described})
    return made


def _described(one: DistanceSet, interval: Interval) -> dict[str, object]:
    return {"count": len(one), "box": box_figures(one.values), "interval": [interval.low, interval.high]}


def _nearest(found: Sequence[Clip], offset: int) -> Mapping[str, object]:
    """Measure how often the nearest object in the later frame is the same one, if that frame has it and another."""
    tried = won = 0
    by_clip = {}
    for clip in found:
        mine = [0, 0]
        for i in range(len(clip.frames)):
            later = np.flatnonzero(clip.frames == clip.frames[i] + offset)
            itself = clip.instances[later] == clip.instances[i]
            if itself.any() and not itself.all():  # alone in the later frame, it would always be the nearest
                nearest = later[int(clip.distances[i, later].argmin())]
                mine[0] += 1
                mine[1] += int(clip.instances[nearest] == clip.instances[i])
        if mine[0]:
            by_clip[clip.name] = {"share": mine[1] / mine[0], "count": mine[0]}
        tried, won = tried + mine[0], won + mine[1]
    return {"share": won / tried if tried else math.nan, "count": tried, "clips": by_clip}
