"""The poster's table on this machine: which rows, what they will take, the runs themselves, and the table.

Every row is one run of `difftap.bench.session`; a run that was stopped goes on where it was. Before anything starts,
each row's cost is estimated from a few images and one pair.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftap.bench.featurefiles import branch_maps
from difftap.bench.journal import read_journal
from difftap.bench.maps import View, load_view
from difftap.bench.protocols import get_protocols
from difftap.bench.report import result_table
from difftap.bench.runner import Opener, for_category, plan
from difftap.bench.scoring import Settings
from difftap.bench.session import Pairs, match_pairs, write_results
from difftap.bench.targets import Joining, find
from difftap.errors import DifftapError, InputError
from difftap.manifest import write_atomic
from difftap.recipe import Branch, Recipe, load_recipe

__all__ = ["PROMPT", "Estimate", "Row", "estimate", "format_estimates", "poster_rows", "reproduce", "stand_in_rows"]

PROMPT = "a photo of a {category}"
"""DIFT's, filled in per class."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: of the row and of its folder.
        recipe: what makes features and matches them.
        combine: how branches are joined.
        reading: how pixels become cells.
    """

    name: str
    recipe: Recipe
    combine: str = "concat"
    reading: str = "centres"

    @property
    def joining(self) -> Joining:
        """How this row joins and matches."""
        return Joining.of(self.recipe, self.combine, self.reading)


def poster_rows(model: str) -> list[Row]:
    """The poster's rows that need no learned prompts, on a Stable Diffusion 2.1 checkpoint."""

    def prompted(name: str) -> Recipe:
        recipe = load_recipe(name)
        branches = tuple(dataclasses.replace(b, prompt=b.prompt or PROMPT) for b in recipe.branches)
        return dataclasses.replace(recipe, model=model, branches=branches)

    return [
        Row("dift", prompted("dift")),
        Row("dift-bicubic", prompted("dift-bicubic")),
        Row("dual", prompted("dual"), "score-sum"),
    ]


def stand_in_rows(size: int | None = None) -> list[Row]:
    """The same rows on the embedded model: the same path where there is neither a checkpoint nor a GPU."""
    recipe = load_recipe("pocket")
    if size is not None:
        recipe = dataclasses.replace(recipe, size=(size, size))
    branch = dataclasses.replace(recipe.branches[0], prompt=PROMPT)
    recipe = dataclasses.replace(recipe, branches=(branch,))
    bicubic = dataclasses.replace(recipe, matcher=dataclasses.replace(recipe.matcher, interpolation="bicubic"))
    layers = tuple(Branch((tap,), branch.timestep, PROMPT) for tap in ("up1", "up2"))
    dual = dataclasses.replace(recipe, branches=layers)
    return [Row("pocket", recipe), Row("pocket-bicubic", bicubic), Row("pocket-dual", dual, "score-sum")]


@dataclass(frozen=True)
class Estimate:
    """What a row will take on a data set.

    Attributes:
        row: its name.
        dataset: the data set's.
        images: extractions still to do.
        pairs: pairs still to match.
        prompts: times the model is opened.
        per_image: seconds to extract one.
        per_pair: seconds to match one.
        per_opening: seconds to open the model.
        refusal: why the row cannot run here; None if it can.
    """

    row: str
    dataset: str
    images: int = 0
    pairs: int = 0
    prompts: int = 0
    per_image: float = 0.0
    per_pair: float = 0.0
    per_opening: float = 0.0
    refusal: str | None = None

    @property
    def seconds(self) -> float:
        """For all that is still to do."""
        return self.images * self.per_image + self.pairs * self.per_pair + self.prompts * self.per_opening


def estimate(row: Row, pairs: Pairs, folder: Path, opener: Opener, memo: dict[str, tuple[float, ...]]) -> Estimate:
    """Time a row on its first pair: opening (warm), one extraction after a warm-up, one match after a warm-up.

    Args:
        row: the method.
        pairs: the data set's.
        folder: the row's, where an earlier run may have left predictions.
        opener: opens a recipe whose prompts are filled in.
        memo: timings by recipe and joining, shared among the data sets.
    """
    name = str(pairs.about["name"])
    if not pairs.samples:
        return Estimate(row.name, name)
    file = folder / "predictions.jsonl"
    done = len(read_journal(file)[1]) if file.is_file() and file.stat().st_size else 0
    rest = [pairs.samples[k] for k in plan(pairs.samples, row.recipe).order[done:]]
    work = plan(rest, row.recipe)
    key = f"{row.recipe.key()}:{row.combine}:{row.reading}"
    if key not in memo:
        try:
            memo[key] = _timed(row, pairs, opener)
        except DifftapError as error:
            return Estimate(row.name, name, refusal=" ".join(str(error).split()))
    per_image, per_pair, per_opening = memo[key]
    return Estimate(row.name, name, work.images(rest), len(rest), len(work.groups), per_image, per_pair, per_opening)


def _timed(row: Row, pairs: Pairs, opener: Opener) -> tuple[float, float, float]:
    sample = pairs.samples[0]
    recipe = for_category(row.recipe, sample.category)
    opener(recipe).close()  # exports what is missing; that is paid once
    clock = time.perf_counter
    began = clock()
    pipeline = opener(recipe)
    opening = clock() - began
    try:
        images = [load_view(view) for view in (View(sample.source), View(sample.target, sample.mirrored))]
        joining = row.joining
        seconds, ready = [], []
        for image in images:
            began = clock()
            (maps,) = branch_maps(pipeline, [image], None)
            ready.append(joining.ready(joining.kept(maps)))
            seconds.append(clock() - began)
        points = sample.source_points
        find(ready[0], ready[1], points, sample.source_size, True)
        began = clock()
        find(ready[0], ready[1], points, sample.source_size, True)
        return seconds[-1], clock() - began, opening
    finally:
        pipeline.close()


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_estimates(estimates: Sequence[Estimate]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"{'data set':12}{'row':18}{'images':>8}{'s/image':>9}{'pairs':>8}{'ms/pair':>9}{'about':>9}"]
    for one in estimates:
        head = f"{one.dataset:12}{one.row:18}"
        if one.refusal:
            lines.append(f"{head}cannot run here: {one.refusal}")
        else:
            figures = f"{one.images:>8}{one.per_image:>9.2f}{one.pairs:>8}{1e3 * one.per_pair:>9.1f}"
            lines.append(head + figures + f"{_span(one.seconds):>9}")
    total = sum(one.seconds for one in estimates)
    return [*lines, f"in all about {_span(total)}, from one pair of each row; finished pairs are not counted"]


def reproduce(
    rows: Sequence[Row],
    sets: Sequence[Pairs],
    folder: Path,
    opener: Opener,
    *,
    settings: Settings | None = None,
    memory: int = 2 << 30,
    batch: int = 1,
    features: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Run every row on every data set and write each data set's table, ours below the published rows.

    A row that cannot run here (its graphs are missing, say) is left out, and said.

    Returns:
        results by data set and row.
    """
    if not sets or not rows:
        raise InputError("nothing to reproduce; give the root of at least one data set")
    made: dict[str, dict[str, Mapping[str, Any]]] = {}
    for pairs in sets:
        name = str(pairs.about["name"])
        made[name] = {}
        for row, place in _places(rows, folder / name):
            say(f"{name}: {row.name}")
            options: dict[str, Any] = {"memory": memory, "batch": batch, "features": features, "progress": progress}
            try:
                run = match_pairs(pairs, row.recipe, place, opener, joining=row.joining, **options)
            except DifftapError as error:
                say(f"{name}: {row.name} left out: {' '.join(str(error).split())}")
                continue
            say(f"{name}: {row.name}: {run.written} pairs in {run.seconds:.0f} s, {run.skipped} already there")
            made[name][row.name] = write_results(place, get_protocols(), settings)
        if made[name]:
            _write_tables(folder / name, made[name])
    return made


def _places(rows: Sequence[Row], folder: Path) -> Iterator[tuple[Row, Path]]:
    for row in rows:
        yield row, folder / row.name


def _write_tables(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """One table a protocol, at alpha 0.05, for all rows that have it."""
    text, tex = [], []
    for protocol in get_protocols():
        runs = [(name, one) for name, one in results.items() if protocol.name in one["protocols"]]
        if runs:
            by = "point" if protocol.headline == "point" else "image"
            table = result_table(runs, protocol.name, 0.05, by, show_published=True)
            text.append(f"## {protocol.name}\n\n{table.markdown()}")
            tex.append(table.latex())
    write_atomic(folder / "table.md", "\n".join(text))
    write_atomic(folder / "table.tex", "\n".join(tex))
