"""From a recipe and annotated pairs to predictions, written pair by pair and resumable; scoring comes afterwards.

Pairs are taken prompt by prompt (a prompt may hold ``{category}``), else in the data set's order. Every image's maps
are made once per prompt and kept in bounded memory while a pair still needs them (`difftap.bench.maps`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftap.bench.featurefiles import FeatureFiles, branch_maps
from difftap.bench.journal import open_journal
from difftap.bench.maps import Made, MapShelf, View, extractor
from difftap.bench.predictions import SCHEMA, Prediction
from difftap.bench.samples import Sample
from difftap.bench.targets import Joining, Ready, find
from difftap.errors import ImageError, InputError, NonFiniteError
from difftap.features import FeatureMap
from difftap.images import Image
from difftap.pipeline import Pipeline
from difftap.recipe import Recipe

__all__ = ["Plan", "PredictRun", "for_category", "plan", "predict", "subset"]

_LOG = logging.getLogger("difftap")
_SLOT = "{category}"

Opener = Callable[[Recipe], Pipeline]
"""Opens a recipe whose prompts are filled in."""


@dataclass(frozen=True)
class PredictRun:
    """What a run did: pairs written now, of them failed, pairs already there, images extracted, seconds it took."""

    written: int
    failed: int
    skipped: int
    images: int
    seconds: float


def for_category(recipe: Recipe, category: str) -> Recipe:
    """The recipe with ``{category}`` in its prompts filled in.

    >>> from difftap.recipe import Branch
    >>> for_category(Recipe((Branch(("up1",), 261, "a photo of a {category}"),)), "cat").branches[0].prompt
    'a photo of a cat'
    """
    branches = [
        dataclasses.replace(branch, prompt=branch.prompt.replace(_SLOT, category)) for branch in recipe.branches
    ]
    return dataclasses.replace(recipe, branches=tuple(branches))


@dataclass(frozen=True)
class Plan:
    """In which order pairs are taken.

    Attributes:
        groups: per prompt, the category that fills it (None if there is nothing to fill) and the pairs' indices.
    """

    groups: tuple[tuple[str | None, tuple[int, ...]], ...]

    @property
    def order(self) -> list[int]:
        """Indices of all pairs, in the order they are taken."""
        return [index for _, indices in self.groups for index in indices]

    def images(self, samples: Sequence[Sample]) -> int:
        """How many times an image goes through the networks."""
        return sum(len({view for i in indices for view in _views(samples[i])}) for _, indices in self.groups)


def plan(samples: Sequence[Sample], recipe: Recipe) -> Plan:
    """Group pairs by what fills the recipe's prompts, in order of first appearance."""
    if not any(_SLOT in branch.prompt for branch in recipe.branches):
        return Plan(((None, tuple(range(len(samples)))),) if samples else ())
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.category, []).append(index)
    return Plan(tuple((category, tuple(indices)) for category, indices in groups.items()))


def subset(samples: Sequence[Sample], limit: int | None = None, per_class: int | None = None) -> list[Sample]:
    """The first ``limit`` of the pairs, or of each class ``per_class`` evenly spaced ones, in the list's order."""
    chosen = list(range(len(samples)))
    if per_class is not None:
        members: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            members.setdefault(sample.category, []).append(index)
        chosen = sorted(
            indices[k * len(indices) // min(per_class, len(indices))]
            for indices in members.values()
            for k in range(min(per_class, len(indices)))
        )
    return [samples[index] for index in chosen[:limit]]


def _views(sample: Sample) -> tuple[View, View]:
    return View(sample.source), View(sample.target, sample.mirrored)


def predict(
    samples: Sequence[Sample],
    recipe: Recipe,
    output: Path,
    open_pipeline: Opener,
    *,
    dataset: Mapping[str, Any],
    joining: Joining,
    confidence: bool = True,
    overwrite: bool = False,
    memory: int = 2 << 30,
    batch: int = 1,
    features: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> PredictRun:
    """Match every pair's keypoints into a file of JSON lines.

    A pair that cannot be used (an image is missing, or is not of the annotated size) is recorded with the reason.

    Args:
        samples: the pairs.
        recipe: what makes features; its prompts may hold ``{category}``.
        output: the JSON lines; continued if an earlier run with the same conditions left them unfinished.
        open_pipeline: opens a recipe; called once for each prompt.
        dataset: name, split and whatever else says which pairs these are; ``name`` decides the protocols' basis.
        joining: how maps are joined and matched.
        confidence: also compute margin and cycle error, at twice the matching's cost.
        overwrite: start afresh whatever ``output`` holds.
        memory: bytes of maps kept in memory; more goes to a scratch folder.
        batch: images extracted together.
        features: a folder for the branches' maps, used again by later runs; None to keep nothing.
        progress: called with the number of pairs just finished.

    Raises:
        InputError: there is no pair.
        OutputError: the output cannot be written, belongs to another run, or is being written by one.
    """
    if not samples:
        raise InputError(f"data set '{dataset.get('name')}' holds no pair to match; check its root and split")
    began = time.perf_counter()
    work = plan(samples, recipe)
    failed = written = images = 0
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="difftap-")))
        first = stack.enter_context(_Opened(open_pipeline, recipe, work.groups[0][0]))
        header = {
            "type": "run",
            "schema": SCHEMA,
            **first.pipeline.conditions,
            "recipe": recipe.to_dict(),
            "recipe_key": recipe.key(),
            "matching": {"combine": joining.combine, "reading": joining.reading, "confidence": confidence},
            "dataset": dict(dataset),
            "pairs": len(samples),
            "pairs_sha256": _digest(samples),
        }
        journal = stack.enter_context(open_journal(output, header, overwrite=overwrite))
        progress(journal.done)
        past = journal.done
        for category, indices in work.groups:
            rest = indices[min(past, len(indices)) :]
            past -= len(indices) - len(rest)
            if not rest:
                continue
            pipeline = first.switch(category)
            files = FeatureFiles(features, pipeline) if features else None
            done = _Group(pipeline, joining, samples, rest, memory, scratch, batch, files)
            for index in rest:
                prediction = done.predict(index, confidence)
                journal.write(prediction.to_dict())
                failed += prediction.error is not None
                written += 1
                progress(1)
            images += done.shelf.made
        return PredictRun(written, failed, journal.done, images, time.perf_counter() - began)


def _digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over what is to be matched; where the files lie has no say."""
    digest = hashlib.sha256()
    for sample in samples:
        listing = [sample.name, sample.category, sample.source.name, sample.target.name, sample.mirrored]
        points = [sample.source_points.tolist(), sample.target_points.tolist(), sample.target_visible.tolist()]
        digest.update(json.dumps([listing, points, sample.target_box]).encode())
    return digest.hexdigest()


class _Opened:
    """One pipeline at a time, reopened when the prompt changes."""

    def __init__(self, opener: Opener, recipe: Recipe, category: str | None) -> None:
        self._opener = opener
        self._recipe = recipe
        self._category = category
        self.pipeline = self._open()

    def _open(self) -> Pipeline:
        recipe = self._recipe if self._category is None else for_category(self._recipe, self._category)
        return self._opener(recipe)

    def switch(self, category: str | None) -> Pipeline:
        if category != self._category:
            self.pipeline.close()
            self._category = category
            self.pipeline = self._open()
        return self.pipeline

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipeline.close()


class _Group:
    """The pairs of one prompt: their maps and what was made ready of them."""

    def __init__(
        self,
        pipeline: Pipeline,
        joining: Joining,
        samples: Sequence[Sample],
        indices: Sequence[int],
        memory: int,
        scratch: Path,
        batch: int,
        files: FeatureFiles | None,
    ) -> None:
        self._joining = joining
        self._samples = samples
        order = [view for index in indices for view in _views(samples[index])]

        def maps(images: Sequence[Image]) -> Iterator[tuple[FeatureMap, ...]]:
            return (joining.kept(made) for made in branch_maps(pipeline, images, files))

        self.shelf = MapShelf(extractor(maps), order, memory, scratch, batch)
        self._ready: dict[View, tuple[Made, Ready]] = {}

    def predict(self, index: int, confidence: bool) -> Prediction:
        """One pair's prediction, or its reason for having none."""
        sample = self._samples[index]
        source, target = _views(sample)
        try:
            ready = []
            for view, size in ((source, sample.source_size), (target, sample.target_size)):
                made, prepared = self._prepare(view)
                if made.size != tuple(size):
                    raise ImageError(
                        f"'{view.path}' has {made.size[0]} x {made.size[1]} pixels, its annotation says "
                        f"{size[0]} x {size[1]}; get the data set's own images"
                    )
                ready.append(prepared)
            found, clamped = find(ready[0], ready[1], sample.source_points, sample.source_size, confidence)
            return Prediction.of(index, sample, found, clamped)
        except (InputError, NonFiniteError) as error:  # anything else is the machine's fault, and would fail every pair
            _LOG.warning("pair %s: %s", sample.name, error)
            return Prediction.of(index, sample, None, error=" ".join(str(error).split()))
        finally:
            for view in self.shelf.done(source, target):
                self._ready.pop(view, None)

    def _prepare(self, view: View) -> tuple[Made, Ready]:
        made = self.shelf.get(view)
        known = self._ready.get(view)
        if known is None or known[0] is not made:  # new, or back from the scratch folder
            known = (made, self._joining.ready(made.maps))
            self._ready = {one: kept for one, kept in self._ready.items() if self.shelf.holds(one)}
            self._ready[view] = known
        return known
