"""What a row will take on a data set, from a few images and one pair of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from difftap.artifacts.run import read_run
from difftap.bench.poster import PosterRow
from difftap.bench.predictions import SCHEMA
from difftap.bench.runner import Opener, finished, plan
from difftap.bench.session import Pairs
from difftap.bench.units import passes, units
from difftap.datasets.keypoints import Sample
from difftap.errors import DifftapError, ImageError
from difftap.features.shelf import load_view
from difftap.images import Image
from difftap.matching.joining import find

__all__ = ["Costs", "Estimate", "Estimator", "format_estimates"]


@dataclass(frozen=True)
class Costs:
    """Seconds: of a pass through a branch, of making an image ready, of matching a pair, of opening the model.

    ``export`` is what the model's first opening took beyond that; it is over when the estimate stands. ``kept`` are
    bytes that a pass adds to the feature files.
    """

    per_pass: float = 0.0
    per_image: float = 0.0
    per_pair: float = 0.0
    opening: float = 0.0
    export: float = 0.0
    kept: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a row will take on a data set.

    Attributes:
        row: its name.
        dataset: the data set's.
        passes: passes of an image through a branch still to do; those that an earlier row leaves in the feature files
            are its own.
        images: images still to be made ready (joined, their norms taken).
        pairs: pairs still to match.
        costs: seconds of each.
        refusal: why the row cannot run here; None if it can.
    """

    row: str
    dataset: str
    passes: int = 0
    images: int = 0
    pairs: int = 0
    costs: Costs = field(default_factory=Costs)
    refusal: str | None = None

    @property
    def seconds(self) -> float:
        """For all that is still to do."""
        cost = self.costs
        work = self.passes * cost.per_pass + self.images * cost.per_image + self.pairs * cost.per_pair
        return work + cost.opening if self.pairs else 0.0


class Estimator:
    """Estimates rows in the order they will run.

    Args:
        opener: opens a recipe.
        batch: images extracted together.
        confidence: whether the rows will ask for margin and cycle error.
        afresh: whatever is there will be done again.
    """

    def __init__(self, opener: Opener, batch: int = 1, confidence: bool = True, afresh: bool = False) -> None:
        self._opener = opener
        self._batch = batch
        self._confidence = confidence
        self._afresh = afresh
        self._costs: dict[str, Costs] = {}
        self._passes: set[tuple[str, object]] = set()

    def __call__(self, row: PosterRow, pairs: Pairs, folder: Path) -> Estimate:
        """Time a row on its first pair, unless that was done, and count what is left to do in its folder."""
        name = str(pairs.about["name"])
        file = folder / "predictions.jsonl"
        there = file.is_file() and file.stat().st_size > 0 and not self._afresh
        done = finished(read_run(file, SCHEMA, "difftap bench pck")[1]) if there else set()
        key = f"{row.recipe.key()}:{row.reading}"
        try:
            rest = [pairs.samples[k] for k in plan(pairs.samples, row.recipe).order if k not in done]
            if not rest:
                return Estimate(row.name, name)
            if key not in self._costs:
                self._costs[key] = self._time(row, *_first_readable(rest, row, pairs))
        except DifftapError as error:
            return Estimate(row.name, name, refusal=" ".join(str(error).split()))
        wanted = dict.fromkeys(unit for sample in rest for unit in units(sample, row.recipe))
        fields = row.recipe.feature_fields()
        branches = fields.pop("branches")
        new = {(f"{fields}{branches[part[1]]}", (part[0], part[2])) for part in passes(list(wanted))} - self._passes
        self._passes |= new
        return Estimate(row.name, name, len(new), len(wanted), len(rest), self._costs[key])

    def _time(self, row: PosterRow, sample: Sample, images: Sequence[Image]) -> Costs:
        """Opening (warm), one batch after a warm-up, one pair's making ready, one match after a warm-up."""
        clock = time.perf_counter
        began = clock()
        self._opener(row.recipe).close()  # exports what is missing; that is paid once
        cold = clock() - began
        began = clock()
        pipeline = self._opener(row.recipe)
        opening = clock() - began
        try:
            both = units(sample, row.recipe)
            for unit, image in zip(both, images, strict=True):
                if any(prompt.pair for prompt in unit.prompts):
                    pipeline.prompts.know(unit.view, image)
            several = (list(images) * self._batch)[: self._batch]
            list(pipeline.features(several, both[0].prompts))
            began = clock()
            list(pipeline.features(several, both[0].prompts))
            extraction = clock() - began
            maps = [
                [one for taps in features.branches for one in taps.values()]
                for features in pipeline.features(images, both[0].prompts)
            ]
            spent = []
            joining = row.joining
            began = clock()
            ready = [joining.ready(joining.kept(one)) for one in maps]
            for _ in range(2):  # the first takes the norms, too
                find(ready[0], ready[1], sample.source_points, sample.source_size, self._confidence)
                spent.append(clock() - began)
                began = clock()
            first, again = spent
            return Costs(
                per_pass=extraction / (len(several) * len(row.recipe.branches)),
                per_image=max(0.0, first - again) / 2,
                per_pair=again,
                opening=opening,
                export=max(0.0, cold - opening),
                kept=sum(one.data.nbytes for one in maps[0]) / len(row.recipe.branches) if row.keepable else 0.0,
            )
        finally:
            pipeline.close()


def _first_readable(samples: Sequence[Sample], row: PosterRow, pairs: Pairs) -> tuple[Sample, list[Image]]:
    """The first pair whose images can be read: a damaged one fails its pairs, not the whole row."""
    for sample in samples[:-1]:
        try:
            return sample, [load_view(unit.view, pairs.makers) for unit in units(sample, row.recipe)]
        except ImageError:
            continue
    return samples[-1], [load_view(unit.view, pairs.makers) for unit in units(samples[-1], row.recipe)]


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_estimates(estimates: Sequence[Estimate]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"{'data set':12}{'row':18}{'passes':>8}{'s/pass':>8}{'images':>8}{'ms/image':>10}{'pairs':>8}{'ms/pair':>9}"
        f"{'about':>9}"
    ]
    for one in estimates:
        head, cost = f"{one.dataset:12}{one.row:18}", one.costs
        if one.refusal:
            lines.append(f"{head}cannot run here: {one.refusal}")
        else:
            lines.append(
                f"{head}{one.passes:>8}{cost.per_pass:>8.2f}{one.images:>8}{1e3 * cost.per_image:>10.1f}{one.pairs:>8}"
                f"{1e3 * cost.per_pair:>9.1f}{_span(one.seconds):>9}"
            )
    total = sum(one.seconds for one in estimates)
    export = sum({one.row: one.costs.export for one in estimates}.values())
    lines.append(f"in all about {_span(total)}, from one pair of each row; what is there already is not counted")
    kept = sum(one.passes * one.costs.kept for one in estimates)
    if kept >= 1e8:
        lines.append(f"feature files: at most {kept / 1e9:.1f} GB more, so that rows share what they have in common")
    if export >= 1:
        lines.append(f"(exporting and encoding for the first time took {_span(export)}, which is over)")
    return lines
