"""Parts of a data set that share no image, to learn on one part and measure on another.

The images of a class are sorted by a hash of their names (relative to the data set's folder) and cut into parts by the
shares. A pair belongs to a part if both its images do; pairs across parts are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from difftap.datasets.keypoints import Sample
from difftap.errors import InputError

__all__ = ["PARTS", "SHARES", "part_of_images", "take_part"]

PARTS = ("train", "val", "test")
SHARES = (0.4, 0.3, 0.3)


def part_of_images(images: Sequence[tuple[str, str]], shares: Sequence[float] = SHARES) -> dict[tuple[str, str], str]:
    """Assign each image ``(class, name)`` to a part. If a class has three images or more, every part gets one of them.

    >>> sorted(part_of_images([("cat", str(k)) for k in range(10)]).values())
    ['test', 'test', 'test', 'train', 'train', 'train', 'train', 'val', 'val', 'val']
    """
    classes: dict[str, list[str]] = {}
    for category, name in sorted(set(images)):
        classes.setdefault(category, []).append(name)
    found = {}
    for category, names in classes.items():
        # A hash, not a random generator: the order of two images must not depend on which others are there.
        names.sort(key=lambda name: hashlib.sha256(f"difftap-part-1:{name}".encode()).hexdigest())
        first = max(1, round(shares[0] * len(names)))
        second = max(first + 1, round((shares[0] + shares[1]) * len(names)))
        if len(names) >= 3:
            first, second = min(first, len(names) - 2), min(second, len(names) - 1)
        for place, name in enumerate(names):
            found[category, name] = PARTS[(place >= first) + (place >= second)]
    return found


def take_part(samples: Sequence[Sample], part: str, root: Path, made: Path | None = None) -> list[Sample]:
    """Choose the pairs of one part.

    Args:
        samples: all pairs.
        part: one of `PARTS`.
        root: the data set's folder.
        made: the folder of targets that were made from their sources; such a target is in the part of its source.

    Raises:
        InputError: there is no such part, or it holds no pair.
    """
    if part not in PARTS:
        raise InputError(f"part is {part!r}; allowed: {', '.join(PARTS)}")

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    def images(sample: Sample) -> list[tuple[str, str]]:
        own = (
            [sample.source]
            if made is not None and sample.target.is_relative_to(made)
            else [sample.source, sample.target]
        )
        return [(sample.category, name(path)) for path in own]

    parts = part_of_images([image for sample in samples for image in images(sample)])
    chosen = [sample for sample in samples if {parts[image] for image in images(sample)} == {part}]
    if not chosen:
        raise InputError(
            f"part '{part}' holds no pair of the {len(samples)}; a class needs images enough in every part"
        )
    return chosen
