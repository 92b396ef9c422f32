"""What a data set of objects holds, and what in it is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from difftap.datasets.layout import DatasetError, Problem, draw_tree, require_files
from difftap.datasets.objects import loader
from difftap.datasets.scenes import Selection
from difftap.errors import InputError

__all__ = ["SCHEMA", "ObjectPart", "ObjectReport", "check_objects"]

SCHEMA = 1


@dataclass(frozen=True)
class ObjectPart:
    """One split.

    Attributes:
        split: its name.
        images: images listed.
        usable: images that can be used; the others have a problem each.
        objects: objects that cover enough of their image, in usable images.
        classes: ``objects`` and ``images`` of each class.
        left_out: annotated objects that are not counted, by reason.
        problems: what is broken.
    """

    split: str
    images: int
    usable: int
    objects: int
    classes: dict[str, dict[str, int]]
    left_out: dict[str, int]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class ObjectReport:
    """All splits of a data set of objects."""

    name: str
    root: Path
    min_area: float
    parts: tuple[ObjectPart, ...]

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
        top = {"schema": SCHEMA, "name": self.name, "root": str(self.root), "ok": self.ok, "min_area": self.min_area}
        return {**top, "parts": parts}


def check_objects(name: str, root: str | Path, *, min_area: float = 0.01) -> ObjectReport:
    """Read every image and mask of every split that a folder holds.

    Args:
        name: one of `difftap.datasets.objects.NAMES`.
        root: the folder.
        min_area: objects count from more than this fraction of their image.

    Raises:
        DatasetError: the folder does not exist, or holds no split.
        InputError: there is no data set of that name.
    """
    module, root = loader(name), Path(root)
    require_files(name, root, module.TREE)
    splits: Sequence[str | None] = module.variants(root) or [None]
    wanted = Selection(min_area=min_area)
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
        objects: Counter[str] = Counter()
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
            objects.update(names)
            images.update(set(names))
            left_out.update(scene.left_out)
        classes = {one: {"objects": objects[one], "images": images[one]} for one in sorted(objects)}
        parts.append(
            ObjectPart(
                split or str(source.about.get("split", "all")),
                listed,
                listed - len(problems),
                objects.total(),
                classes,
                dict(sorted(left_out.items())),
                tuple(problems),
            )
        )
    if not any(part.images for part in parts):
        raise DatasetError(f"'{name}' in '{root}' lists no images; restore its list", draw_tree(root, module.TREE))
    return ObjectReport(name, root, min_area, tuple(parts))
