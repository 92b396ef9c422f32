"""Point-matching data sets: `load` takes a name and a folder and gives pairs of images with keypoints (`Sample`).

Each data set is one module with ``load(root, *, split, allow_missing, cache, ...)``, the ``TREE`` of files that it
expects, and ``variants(root)``, the options under which the folder has a list of pairs. A module is imported when it is
first used. This file holds what they share: the pair, the reading of lists, and the `Collector`, which turns every
broken pair into a `Problem`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from difftap.artifacts.files import JsonObject, atomic_path, output_errors
from difftap.coords import Size
from difftap.datasets.layout import BadPairError, DatasetError, Problem, Tree, draw_tree, load_with
from difftap.errors import InputError
from difftap.images import read_size

__all__ = [
    "NAMES",
    "AnnotatedImage",
    "Box",
    "Collector",
    "Dataset",
    "ListLine",
    "Loader",
    "Sample",
    "joined",
    "load",
    "loader",
    "points_array",
    "read_list",
    "save_png",
    "to_box",
    "to_number",
]

T = TypeVar("T")

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)`` in pixels of the original image, as annotated; it may reach beyond the image."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated pair, in pixels of the original images.

    Attributes:
        name: unique within its data set, stable across runs.
        source: the source image's file.
        target: the target image's file.
        category: the class both objects belong to.
        source_points: ``(N, 2)``, x and y in the source of the keypoints that are annotated in both images.
        target_points: ``(N, 2)``, x and y of the same keypoints in the target.
        keypoint_ids: N names of these keypoints, the same for all pairs of the class.
        target_visible: ``(M, 2)``, every keypoint annotated in the target, also those that the source lacks. PCK-dagger
            asks whether a match is nearer to another one of these.
        target_ids: M names of these.
        source_size: ``(W, H)`` of the source image.
        target_size: ``(W, H)`` of the target image.
        source_box: the source object's box, if annotated.
        target_box: the target object's box, if annotated.
        flags: the annotated difficulty of the pair (SPair-71k: ``viewpoint_variation``, ``scale_variation``,
            ``truncation``, ``occlusion``), as integers.
        mirrored: whether the target must be flipped left to right before use. Points and box are those of the flipped
            image.
    """

    name: str
    source: Path
    target: Path
    category: str
    source_points: NDArray[np.float64]
    target_points: NDArray[np.float64]
    keypoint_ids: tuple[str, ...]
    target_visible: NDArray[np.float64]
    target_ids: tuple[str, ...]
    source_size: Size
    target_size: Size
    source_box: Box | None = None
    target_box: Box | None = None
    flags: Mapping[str, int] = field(default_factory=dict)
    mirrored: bool = False

    def __post_init__(self) -> None:
        count = len(self.keypoint_ids)
        if self.source_points.shape != (count, 2) or self.target_points.shape != (count, 2):
            raise InputError(
                f"pair '{self.name}' has points {self.source_points.shape} and {self.target_points.shape} for {count} "
                "keypoint names; allowed: (N, 2) both"
            )
        if self.target_visible.shape != (len(self.target_ids), 2):
            raise InputError(
                f"pair '{self.name}' has {len(self.target_ids)} names for {self.target_visible.shape} points; "
                "allowed: (M, 2), one name per point"
            )
        if not (np.isfinite(self.source_points).all() and np.isfinite(self.target_points).all()):
            raise InputError(f"pair '{self.name}' has keypoints that are not finite; absent ones must be left out")


# ---- a split's pairs

_SHOWN = 10  # problems that an error lists; ``data check`` lists all


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Sample]):
    """The usable pairs of one split, in the list's order, and the pairs that were left out.

    Some images are made by us (mirrored copies, warped targets). Taking a pair by index or in a loop writes those of
    its images that do not exist yet; reading ``samples`` does not.

    Attributes:
        name: name of the data set, one of `difftap.datasets.keypoints.NAMES`.
        split: the split's name.
        root: the folder it was read from.
        samples: the usable pairs.
        problems: the pairs that were left out, and why; ``len(samples) + len(problems)`` pairs were listed.
        notes: sentences that a reader of the scores should know. They leave no pair out.
        unused: what lies in the folder and is not used, in words.
        generators: the images made by us: file -> function that writes it.
    """

    name: str
    split: str
    root: Path
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    generators: Mapping[Path, Callable[[], None]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        sample = self.samples[index]
        for path in (sample.source, sample.target):
            if path in self.generators and not path.exists():
                self.generators[path]()
        return sample

    def problem_counts(self) -> dict[str, int]:
        """Count the pairs left out, by kind of problem."""
        return dict(Counter(problem.kind for problem in self.problems))


class Collector:
    """Gather the samples of a split, and a problem for each pair that cannot be used.

    ::

        for name in names:
            with collector.pair(name):
                collector.add(Sample(...))      # an error in here becomes a problem of this pair
        return collector.finish(allow_missing)
    """

    def __init__(self, name: str, split: str, root: Path) -> None:
        self._dataset = Dataset(name, split, root, ())
        self._samples: list[Sample] = []
        self._problems: list[Problem] = []
        self._notes: dict[str, int] = {}
        self.unused: list[str] = []
        self._names: Counter[str] = Counter()
        # Both are kept, because an image or an annotation belongs to many pairs.
        self._sizes: dict[Path, Size | BadPairError] = {}
        self._documents: dict[Path, Any] = {}
        self.generators: dict[Path, Callable[[], None]] = {}

    @contextlib.contextmanager
    def pair(self, name: str) -> Iterator[None]:
        """Turn an error about one pair into its problem; raise a `DatasetError`, which concerns all pairs."""
        try:
            yield
        except DatasetError:  # is an InputError too
            raise
        except BadPairError as error:
            self._problems.append(Problem(error.kind, name, str(error), error.path))
        # The annotation is somebody's JSON or .mat file: a missing key, a text for a number, a list for an object.
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            self._problems.append(Problem("malformed", name, f"its annotation cannot be used: {what}"))

    def note(self, text: str) -> None:
        """Record a sentence that a reader of the scores should know; keep a repeated one once, with its count."""
        self._notes[text] = self._notes.get(text, 0) + 1

    def add(self, sample: Sample) -> None:
        """Add a pair. If its name was used before, it gets a number, because names must be unique.

        Raises:
            BadPairError: it has no keypoints.
        """
        if not sample.keypoint_ids:
            raise BadPairError("no-keypoints", "no keypoint is annotated in both images")
        self._names[sample.name] += 1
        if self._names[sample.name] > 1:  # results are compared by the pairs' names
            self.note("the list repeats a pair; each repetition counts")
            sample = replace(sample, name=f"{sample.name}#{self._names[sample.name]}")
        self._samples.append(sample)

    def size(self, path: Path, annotated: Sequence[int] | None = None) -> Size:
        """Read the size ``(W, H)`` of an image after it was turned upright.

        Args:
            path: the image.
            annotated: the size that its annotation states: W, H and maybe more.

        Raises:
            BadPairError: the image is missing or damaged, or its annotation states another size.
        """
        if path not in self._sizes:
            try:
                if not path.is_file():
                    raise BadPairError("missing-image", f"there is no image '{path}'", path)
                self._sizes[path] = read_size(path)
            except BadPairError as error:
                self._sizes[path] = error
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
                self._sizes[path] = BadPairError("unreadable-image", f"'{path}' cannot be read ({error})", path)
        size = self._sizes[path]
        if isinstance(size, BadPairError):
            raise size
        if annotated is not None and tuple(annotated[:2]) != size:
            raise BadPairError(
                "size-mismatch",
                f"'{path}' is {size[0]}x{size[1]}, but annotated as {annotated[0]}x{annotated[1]}",
                path,
            )
        return size

    def document(self, path: Path, read: Callable[[Path], T]) -> T:
        """Read a file of annotations; the second time, give what was read the first time.

        Raises:
            BadPairError: the file is missing or cannot be read.
        """
        if path not in self._documents:
            if not path.is_file():
                raise BadPairError("missing-annotation", f"there is no annotation '{path}'", path)
            try:
                self._documents[path] = read(path)
            except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
                raise BadPairError("malformed", f"'{path}' cannot be read ({error})", path) from error
        document: T = self._documents[path]
        return document

    def json(self, path: Path, *, keep: bool = True) -> JsonObject:
        """Read a JSON file; ``keep=False`` does not hold its content for the next time.

        Raises:
            BadPairError: the file is missing or is not JSON.
        """
        content: JsonObject = self.document(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
        if not keep:
            del self._documents[path]
        return content

    def finish(self, allow_missing: bool) -> Dataset:
        """Return the data set.

        Raises:
            DatasetError: pairs were left out although ``allow_missing`` is not set, or no pair remains.
        """
        notes = tuple(text if times == 1 else f"{text} ({times} times)" for text, times in self._notes.items())
        found = replace(
            self._dataset,
            samples=tuple(self._samples),
            problems=tuple(self._problems),
            notes=notes,
            unused=tuple(self.unused),
            generators=self.generators,
        )
        if self._problems and not (allow_missing and self._samples):
            listed = len(found) + len(found.problems)
            kinds = ", ".join(f"{count} {kind}" for kind, count in found.problem_counts().items())
            mend = "mend them, or allow missing pairs" if self._samples else "none is left to use"
            lines = [f"{problem.pair}: {problem.message}" for problem in found.problems[:_SHOWN]]
            more = len(found.problems) - _SHOWN
            raise DatasetError(
                f"{len(found.problems)} of {listed} pairs of '{found.name}' ({found.split}) in '{found.root}' cannot "
                f"be used: {kinds}; {mend} ('difftap data check {found.name} {found.root}' lists what is broken)",
                "\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])]),
                found.problems,
            )
        if not self._samples:
            raise DatasetError(f"'{found.name}' ({found.split}) in '{found.root}' lists no pairs; restore its list")
        return found


def save_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an image ``(H, W, 3)``, whole or not at all; make its folder if it does not exist."""
    from PIL import Image as PIL

    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as scratch:
        PIL.fromarray(np.ascontiguousarray(pixels)).save(scratch, format="PNG")


# ---- reading annotations: lists of pairs, numbers, boxes, keypoints


@dataclass(frozen=True)
class ListLine:
    """One line of a CSV list.

    Attributes:
        label: file and line number, to name it in errors.
        cells: the line's cells.
        header: the names of the columns.
    """

    label: str
    cells: tuple[str, ...]
    header: tuple[str, ...]

    def row(self) -> dict[str, str]:
        """Map each column's name to the line's cell.

        Raises:
            BadPairError: the line has too few cells or too many.
        """
        if len(self.cells) != len(self.header):
            raise BadPairError("malformed", f"{len(self.cells)} cells; the header has {len(self.header)}")
        return dict(zip(self.header, self.cells, strict=True))


def read_list(path: Path, columns: Sequence[str], root: Path, tree: Tree) -> list[ListLine]:
    """Read the lines of a CSV file with a header; skip blank lines.

    Raises:
        DatasetError: it cannot be read, is empty, or lacks one of ``columns``.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:  # spreadsheet programs write a byte order mark
            reader = csv.reader(handle)
            rows = [(reader.line_num, tuple(map(str.strip, row))) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"'{path}' cannot be read as CSV ({error}); restore it") from error
    if not rows:
        raise DatasetError(f"'{path}' is empty; a list of pairs has a header and a line for each pair")
    header = rows[0][1]
    absent = [column for column in columns if column not in header]
    if absent:
        raise DatasetError(f"'{path}' lacks the columns {', '.join(absent)}; restore it", draw_tree(root, tree))
    return [ListLine(f"{path.name} line {number}", cells, header) for number, cells in rows[1:]]


def to_number(text: str) -> float:
    """Read a cell's number. An empty cell gives NaN: some lists mark an absent keypoint so.

    Raises:
        BadPairError: the cell is not a number.
    """
    try:
        return float(text) if text.strip() else float("nan")
    except ValueError:
        raise BadPairError("malformed", f"'{text}' is not a number") from None


def to_box(values: ArrayLike) -> Box:
    """Make a box of four numbers x1, y1, x2, y2 in pixels. It may reach beyond the image.

    Raises:
        BadPairError: these are not four finite numbers, or x2 < x1, or y2 < y1, or the box is a single point.
    """
    numbers = np.asarray(values, np.float64).ravel()
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise BadPairError("malformed", f"the box {numbers.tolist()} is not x1, y1, x2, y2")
    x1, y1, x2, y2 = (float(value) for value in numbers)
    # A box of zero width is allowed: protocols use the longer side, which only a single point lacks.
    if x2 < x1 or y2 < y1 or (x1 == x2 and y1 == y2):
        raise BadPairError("malformed", f"the box {numbers.tolist()} is empty or inside out")
    return x1, y1, x2, y2


def points_array(points: Iterable[ArrayLike | None]) -> NDArray[np.float64]:
    """Make an array ``(N, 2)`` of keypoints. A keypoint that is null, and a coordinate that is null, becomes NaN."""
    filled = [(None, None) if point is None else point for point in points]  # numpy reads None as NaN
    return np.asarray(filled, np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of a pair.

    Attributes:
        image: its file.
        size: ``(W, H)``.
        points: ``(M, 2)``, a row for each keypoint of the class; not finite where it is absent.
        box: the object's box, if annotated.
    """

    image: Path
    size: Size
    points: NDArray[np.float64]
    box: Box | None = None


def joined(
    name: str, category: str, sides: Sequence[AnnotatedImage], ids: Sequence[str], *, mirrored: bool = False
) -> Sample:
    """Join two images to a pair. Both have a keypoint for each name in ``ids``; absent keypoints are left out.

    Raises:
        BadPairError: the images do not have a keypoint, present or absent, for each name.
    """
    source, target = sides
    if not len(source.points) == len(target.points) == len(ids):
        counts = f"{len(source.points)} and {len(target.points)}"
        raise BadPairError("malformed", f"the images have {counts} keypoints, absent ones included; must be equal")
    there = [np.asarray(np.isfinite(side.points).all(axis=1), np.bool_) for side in sides]
    both = np.asarray(there[0] & there[1], np.bool_)
    return Sample(
        name=name,
        source=source.image,
        target=target.image,
        category=category,
        source_points=source.points[both],
        target_points=target.points[both],
        keypoint_ids=tuple(key for key, kept in zip(ids, both, strict=True) if kept),
        target_visible=target.points[there[1]],
        target_ids=tuple(key for key, kept in zip(ids, there[1], strict=True) if kept),
        source_size=source.size,
        target_size=target.size,
        source_box=source.box,
        target_box=target.box,
        mirrored=mirrored,
    )


# ---- the data sets

_MODULES = {
    "pf-pascal": "difftap.datasets.pf_pascal",
    "pf-willow": "difftap.datasets.pf_willow",
    "spair": "difftap.datasets.spair",
    "synthetic": "difftap.datasets.synthetic",
}

NAMES = tuple(_MODULES)
"""The data sets' names, as `load` and the command line take them."""


class Loader(Protocol):
    """What a loader's module offers."""

    TREE: Tree
    SPLITS: tuple[str, ...]

    def load(
        self, root: Path, *, split: str = ..., allow_missing: bool = ..., cache: Path | None = ..., **options: object
    ) -> Dataset:
        """Read the pairs of one split."""

    def variants(self, root: Path) -> Iterator[dict[str, str]]:
        """Yield the options of `load` under which the folder has a list of pairs."""


def loader(name: str) -> Loader:
    """Import the module that reads a data set.

    Raises:
        InputError: there is no data set of that name.
    """
    if name not in _MODULES:
        raise InputError(f"no data set '{name}'; allowed: {', '.join(NAMES)}")
    return cast(Loader, importlib.import_module(_MODULES[name]))


def load(name: str, root: str | Path, **options: object) -> Dataset:
    """Read a data set's pairs.

    Args:
        name: one of `NAMES`.
        root: the folder it lies in.
        options: ``split``, ``allow_missing``, ``cache``, and further options of the data set's own ``load``.

    Raises:
        DatasetError: the folder is not laid out as expected, or pairs are broken and ``allow_missing`` is not set.
        InputError: an option is not one of those allowed.
    """
    return load_with(name, loader(name).load, Path(root), options)
