"""What a data set's folder holds, and what in it is broken."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from difftap.datasets.collect import Dataset
from difftap.datasets.keypoints import loader
from difftap.datasets.layout import DatasetError, Problem, require_files
from difftap.errors import DifftapError
from difftap.images import load_image

__all__ = ["SCHEMA", "Part", "Report", "check"]

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """One list of pairs.

    Attributes:
        options: the options of `difftap.datasets.keypoints.load` that read it.
        pairs: pairs listed.
        usable: pairs that can be used; the others have a problem each.
        images: images that the usable pairs name.
        keypoints: keypoints of the usable pairs, those annotated in both images.
        classes: ``usable``, ``images`` and ``keypoints`` of each class.
        problems: what is broken.
        notes: what a reader of the scores should know.
    """

    options: dict[str, Any]
    pairs: int
    usable: int
    images: int
    keypoints: int
    classes: dict[str, dict[str, int]]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All lists of a data set."""

    name: str
    root: Path
    parts: tuple[Part, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not any(part.problems for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (docs/datasets.md)."""
        parts = [asdict(part) for part in self.parts]
        for part in parts:
            part["problem_counts"] = dict(Counter(problem["kind"] for problem in part["problems"]))
            for problem in part["problems"]:
                problem["path"] = None if problem["path"] is None else str(problem["path"])
        return {"schema": SCHEMA, "name": self.name, "root": str(self.root), "ok": self.ok, "parts": parts}


def check(name: str, root: str | Path, *, decode: bool = True) -> Report:
    """Read every list of pairs that a data set's folder holds, and every image they name.

    Args:
        name: one of `difftap.datasets.keypoints.NAMES`.
        root: the folder.
        decode: decode the images, rather than look at their headers alone.

    Raises:
        DatasetError: the folder does not exist, or holds no list of pairs.
        InputError: there is no data set of that name.
    """
    module, root = loader(name), Path(root)
    require_files(name, root, module.TREE)
    parts, faults = [], dict[Path, DifftapError | None]()
    with tempfile.TemporaryDirectory() as cache:  # stays empty: nothing is taken from the data sets
        for options in module.variants(root):
            try:
                found = module.load(root, allow_missing=True, cache=Path(cache), **options)
            except DatasetError as error:
                if not error.problems:
                    raise
                found = Dataset(name, options["split"], root, (), error.problems)
            parts.append(_part(_decoded(found, faults) if decode else found, options))
        if not parts:
            module.load(root, cache=Path(cache))  # says what is missing
    return Report(name, root, tuple(parts))


def _images(found: Dataset) -> Iterator[tuple[str, Path]]:
    """The class and file of both images of every pair, but for those that would have to be made."""
    for sample in found.samples:
        for path in (sample.source, sample.target):
            if path not in found.makers:
                yield sample.category, path


def _decoded(found: Dataset, faults: dict[Path, DifftapError | None]) -> Dataset:
    """The data set without the pairs whose images turn out to be damaged; ``faults`` remembers each image."""
    for _, path in _images(found):
        if path not in faults:
            try:
                load_image(path)
                faults[path] = None
            except DifftapError as error:
                faults[path] = error
    samples, problems = [], list(found.problems)
    for sample in found.samples:
        bad = next((path for path in (sample.source, sample.target) if faults.get(path)), None)
        if bad is None:
            samples.append(sample)
        else:
            problems.append(Problem("unreadable-image", sample.name, str(faults[bad]), bad))
    return replace(found, samples=tuple(samples), problems=tuple(problems))


def _part(found: Dataset, options: dict[str, Any]) -> Part:
    images = set(_images(found))
    classes = {
        category: {
            "usable": sum(sample.category == category for sample in found.samples),
            "images": sum(owner == category for owner, _ in images),
            "keypoints": sum(len(sample.keypoint_ids) for sample in found.samples if sample.category == category),
        }
        for category in sorted({sample.category for sample in found.samples})
    }
    return Part(
        options=options,
        pairs=len(found) + len(found.problems),
        usable=len(found),
        images=len({path for _, path in images}),
        keypoints=sum(len(sample.keypoint_ids) for sample in found.samples),
        classes=classes,
        problems=found.problems,
        notes=found.notes,
    )
