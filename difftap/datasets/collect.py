"""What the loaders share: the data set they return, and the collector that no broken pair gets past unnoticed."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from difftap.coords import Size
from difftap.datasets.layout import BadPairError, DatasetError, Problem
from difftap.datasets.samples import Sample
from difftap.errors import InputError
from difftap.images import read_size

__all__ = ["Collector", "Dataset"]

_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Sample]):
    """The usable pairs of one split, in the list's order, with what was left out.

    Taking a pair from it (by index or in a loop) first makes those of its images that have to be made; `samples` are
    the same pairs without that.

    Attributes:
        name: of the data set, as in `difftap.datasets.keypoints.NAMES`.
        split: which part of it.
        root: the folder it was read from.
        samples: the usable pairs.
        problems: the pairs that were left out, and why; ``len(samples) + len(problems)`` pairs were listed.
        notes: what a reader of the scores should know, in sentences; nothing was left out for it.
        makers: images that are not part of the data set's folder: file -> what writes it.
    """

    name: str
    split: str
    root: Path
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    makers: Mapping[Path, Callable[[], None]] = field(default_factory=dict, repr=False)

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
            if path in self.makers and not path.exists():
                self.makers[path]()
        return sample

    def problem_counts(self) -> dict[str, int]:
        """Number of pairs left out, by kind of problem."""
        return dict(Counter(problem.kind for problem in self.problems))


class Collector:
    """Gathers a split's samples, and a problem for each pair that cannot be one.

    ::

        for name in names:
            with collector.pair(name):
                collector.add(Sample(...))      # whatever goes wrong in here becomes a problem of this pair
        return collector.finish(allow_missing)
    """

    def __init__(self, name: str, split: str, root: Path) -> None:
        self._dataset = Dataset(name, split, root, ())
        self._samples: list[Sample] = []
        self._problems: list[Problem] = []
        self._notes: dict[str, int] = {}
        self._names: Counter[str] = Counter()
        self._sizes: dict[Path, Size | BadPairError] = {}
        self._documents: dict[Path, Any] = {}
        self.makers: dict[Path, Callable[[], None]] = {}

    @contextlib.contextmanager
    def pair(self, name: str) -> Iterator[None]:
        """Turn what goes wrong with one pair into a problem; a `DatasetError`, which concerns all of them, passes."""
        try:
            yield
        except DatasetError:
            raise
        except BadPairError as error:
            self._problems.append(Problem(error.kind, name, str(error), error.path))
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            self._problems.append(Problem("malformed", name, f"its annotation cannot be used: {what}"))

    def note(self, text: str) -> None:
        """Record something a reader of the scores should know; said often, it is written once, with the count."""
        self._notes[text] = self._notes.get(text, 0) + 1

    def add(self, sample: Sample) -> None:
        """Take a pair in; one without keypoints is a problem, and a name that comes again gets a number."""
        if not sample.keypoint_ids:
            raise BadPairError("no-keypoints", "no keypoint is annotated in both images")
        self._names[sample.name] += 1
        if self._names[sample.name] > 1:
            self.note("the list repeats a pair; each repetition counts")
            sample = replace(sample, name=f"{sample.name}#{self._names[sample.name]}")
        self._samples.append(sample)

    def size(self, path: Path, annotated: Any = None) -> Size:
        """``(W, H)`` of an image, upright; if its annotation states a size, that must be the same."""
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

    def document(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """What a file of annotations holds, read once."""
        if path not in self._documents:
            if not path.is_file():
                raise BadPairError("missing-annotation", f"there is no annotation '{path}'", path)
            try:
                self._documents[path] = read(path)
            except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
                raise BadPairError("malformed", f"'{path}' cannot be read ({error})", path) from error
        return self._documents[path]

    def json(self, path: Path, *, keep: bool = True) -> Any:
        """What a JSON file holds; kept for the next time, or not."""
        content = self.document(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
        if not keep:
            del self._documents[path]
        return content

    def finish(self, allow_missing: bool) -> Dataset:
        """The data set.

        Raises:
            DatasetError: pairs were left out and that was not allowed, or none remains.
        """
        notes = tuple(text if times == 1 else f"{text} ({times} times)" for text, times in self._notes.items())
        found = replace(
            self._dataset,
            samples=tuple(self._samples),
            problems=tuple(self._problems),
            notes=notes,
            makers=self.makers,
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
