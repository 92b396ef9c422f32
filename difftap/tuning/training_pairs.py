"""Read the pairs that a prompt is learned from, and the pairs that choose the best epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from difftap.datasets.keypoints import Sample, load, loader
from difftap.datasets.parts import SHARES, take_part
from difftap.errors import InputError

__all__ = ["TrainingPairs", "load_training_pairs"]


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs of a training.

    Attributes:
        train: pairs that the gradient is computed on.
        val: pairs that share no image with them, or the data set's own validation pairs.
        about: which pairs these are, for the prompt's provenance.
        generators: functions that write images which do not exist yet, by file.
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    about: Mapping[str, object]
    generators: Mapping[Path, Callable[[], None]] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """The training pairs' classes, sorted."""
        return tuple(sorted({sample.category for sample in self.train}))


def load_training_pairs(
    name: str,
    root: Path,
    made: Path,
    *,
    options: Mapping[str, object] | None = None,
    allow_missing: bool = False,
    limit: int | None = None,
    val_limit: int | None = None,
) -> TrainingPairs:
    """Read a data set's pairs for learning.

    If the data set has lists ``trn`` and ``val``, they are used. Otherwise its images are cut into parts
    (`difftap.datasets.parts`), so that training, validation and test pairs share no image. Validation pairs of a class
    without training pairs are left out, since a prompt of that class is not learned.

    Args:
        name: one of `difftap.datasets.keypoints.NAMES`.
        root: its folder.
        made: folder for images that must be made.
        options: options of its loader.
        allow_missing: leave broken pairs out.
        limit: at most this many training pairs, evenly spaced.
        val_limit: at most this many validation pairs, evenly spaced.

    Raises:
        InputError: the folder is not laid out as expected, or holds too few pairs.
    """
    splits = set(loader(name).SPLITS)
    options = dict(options or {})
    generators: dict[Path, Callable[[], None]] = {}
    parts = []
    if {"trn", "val"} <= splits:
        how = "its own lists trn and val"
        for split in ("trn", "val"):
            data = load(name, root, split=split, allow_missing=allow_missing, cache=made, **options)
            generators |= data.generators
            parts.append(list(data.samples))
    else:
        how = "parts by image, train/val/test " + "/".join(f"{share:g}" for share in SHARES)
        data = load(name, root, allow_missing=allow_missing, cache=made, **options)
        generators |= data.generators
        parts = [take_part(data.samples, part, root, made) for part in ("train", "val")]
    train, val = parts
    about: dict[str, object] = {"name": name, "how": how}
    train = _spread(train, limit)
    known = {sample.category for sample in train}
    val = _spread([sample for sample in val if sample.category in known], val_limit)
    about |= {**options, "train_pairs": len(train), "val_pairs": len(val), "pairs_sha256": _digest([*train, *val])}
    if not val:
        raise InputError(f"no validation pair of '{name}' is of a class with training pairs; give more data")
    return TrainingPairs(train, val, about, generators)


def _spread(samples: list[Sample], count: int | None) -> list[Sample]:
    if count is None or count >= len(samples):
        return samples
    return [samples[k * len(samples) // count] for k in range(count)]


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        listing = [sample.name, sample.category, sample.source.name, sample.target.name, sample.mirrored]
        digest.update(json.dumps([*listing, sample.source_points.tolist(), sample.target_points.tolist()]).encode())
    return digest.hexdigest()
