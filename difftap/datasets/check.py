"""Check a data set's folder: count what it holds and list what is broken."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from difftap.datasets import keypoints, objects
from difftap.datasets.keypoints import Dataset
from difftap.datasets.layout import DatasetError, Problem, draw_tree, require_files
from difftap.datasets.objects import ObjectFilter
from difftap.errors import DifftapError, InputError
from difftap.images import load_image

__all__ = ["SCHEMA", "ObjectPart", "Part", "Report", "check", "check_objects"]

SCHEMA = 1
"""Version of the data that `Report.to_dict` gives."""


@dataclass(frozen=True)
class Part:
    """The findings about one list of pairs.

    Attributes:
        options: the options of `difftap.datasets.keypoints.load` that read it.
        pairs: pairs listed.
        usable: pairs that can be used; each of the others has an entry in ``problems``.
        images: images that the usable pairs name.
        keypoints: keypoints of the usable pairs, those annotated in both images.
        classes: ``usable``, ``images`` and ``keypoints`` of each class.
        problems: what is broken.
        notes: what a reader of the scores should know.
        unused: what lies in the folder and is not used, in words.
    """

    options: dict[str, str]
    pairs: int
    usable: int
    images: int
    keypoints: int
    classes: dict[str, dict[str, int]]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectPart:
    """The findings about one split of objects.

    Attributes:
        split: its name.
        images: images listed.
        usable: images that can be used; each of the others has an entry in ``problems``.
        objects: objects that cover enough of their image, in usable images.
        classes: ``objects`` and ``images`` of each class.
        left_out: annotated objects that are not counted, by reason.
        problems: what is broken.
        unused: what lies in the folder and is not used, in words.
    """

    split: str
    images: int
    usable: int
    objects: int
    classes: dict[str, dict[str, int]]
    left_out: dict[str, int]
    problems: tuple[Problem, ...]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The findings about a data set: all its lists of pairs, or all its splits of objects.

    Attributes:
        name: name of the data set.
        root: its folder.
        parts: one for each list of pairs, or for each split of objects.
        min_area: objects are counted if they cover more than this fraction of their image; None for pairs.
    """

    name: str
    root: Path
    parts: tuple[Part, ...] | tuple[ObjectPart, ...]
    min_area: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not any(part.problems for part in self.parts)

    @property
    def whole(self) -> bool:
        """Whether everything that lies in the folder is used, too."""
        return self.ok and not any(part.unused for part in self.parts)

    def to_dict(self) -> dict[str, object]:
        """Give the report as plain data (docs/datasets.md)."""
        parts = [asdict(part) for part in self.parts]
        for part in parts:
            part["problem_counts"] = dict(Counter(problem["kind"] for problem in part["problems"]))
            for problem in part["problems"]:
                problem["path"] = None if problem["path"] is None else str(problem["path"])
        top = {"schema": SCHEMA, "name": self.name, "root": str(self.root), "ok": self.ok}
        area = {} if self.min_area is None else {"min_area": self.min_area}
        return {**top, **area, "parts": parts}


def check(name: str, root: str | Path, *, decode: bool = True) -> Report:
    """Read every list of pairs that a data set's folder holds, and every image that the lists name.

    Args:
        name: one of `difftap.datasets.keypoints.NAMES`.
        root: the folder.
        decode: decode every image completely; otherwise read only its header.

    Raises:
        DatasetError: the folder does not exist, or holds no list of pairs.
        InputError: there is no data set of that name.
    """
    module, root = keypoints.loader(name), Path(root)
    require_files(name, root, module.TREE)
    parts, faults = [], dict[Path, DifftapError | None]()
    # Some loaders want a cache. It stays empty, because images are made only when a pair is taken from the data set.
    with tempfile.TemporaryDirectory() as cache:
        for options in module.variants(root):
            try:
                found = keypoints.load(name, root, allow_missing=True, cache=Path(cache), **options)
            except DatasetError as error:
                # With problems: the list was read, but no pair of it can be used. That is a finding, not a failure.
                if not error.problems:
                    raise
                found = Dataset(name, options["split"], root, (), error.problems)
            parts.append(_part(_decoded(found, faults) if decode else found, options))
        if not parts:
            module.load(root, cache=Path(cache))  # raises: no list is there, and the error names what is missing
    return Report(name, root, tuple(parts))


def _images(found: Dataset) -> Iterator[tuple[str, Path]]:
    """Yield the class and the file of both images of every pair, except images that would have to be made first."""
    for sample in found.samples:
        for path in (sample.source, sample.target):
            if path not in found.generators:
                yield sample.category, path


def _decoded(found: Dataset, faults: dict[Path, DifftapError | None]) -> Dataset:
    """Return the data set without the pairs whose images cannot be decoded.

    ``faults`` holds the result of each image, so that an image of many pairs, or of many lists, is decoded once.
    """
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


def _part(found: Dataset, options: dict[str, str]) -> Part:
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
        unused=found.unused,
    )


def check_objects(name: str, root: str | Path, *, min_area: float = 0.01) -> Report:
    """Read every image and mask of every split that a folder holds.

    Args:
        name: one of `difftap.datasets.objects.NAMES`.
        root: the folder.
        min_area: count objects that cover more than this fraction of their image.

    Raises:
        DatasetError: the folder does not exist, or holds no split.
        InputError: there is no data set of that name.
    """
    module, root = objects.loader(name), Path(root)
    require_files(name, root, module.TREE)
    splits: Sequence[str | None] = module.variants(root) or [None]  # None: the loader says what is missing
    wanted = ObjectFilter(min_area=min_area)
    parts = []
    for split in splits:
        try:
            source = module.load(root, split=split, wanted=wanted, allow_missing=True)
        except DatasetError as error:
            if not error.problems:
                raise
            parts.append(ObjectPart(split or "all", len(error.problems), 0, 0, {}, {}, error.problems))
            continue
        problems = [Problem(kind, key, message) for key, kind, message in source.missing]
        counted: Counter[str] = Counter()
        images: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        listed = len(source) + len(problems)
        for key in source.keys:
            try:
                scene = source.read(key)
            except InputError as error:
                problems.append(Problem("unreadable", key, " ".join(str(error).split())))
                continue
            names = [one.category for one in scene.objects]
            counted.update(names)
            images.update(set(names))
            left_out.update(scene.left_out)
        classes = {one: {"objects": counted[one], "images": images[one]} for one in sorted(counted)}
        parts.append(
            ObjectPart(
                split or str(source.about.get("split", "all")),
                listed,
                listed - len(problems),
                counted.total(),
                classes,
                dict(sorted(left_out.items())),
                tuple(problems),
                source.unused,
            )
        )
    if not any(part.images for part in parts):
        raise DatasetError(f"'{name}' in '{root}' lists no images; restore its list", draw_tree(root, module.TREE))
    return Report(name, root, tuple(parts), min_area)
