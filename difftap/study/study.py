"""The study from data sets to results: build the tables of prototypes, or find them, and analyse them axis by axis."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from difftap.artifacts.files import JsonObject, output_errors
from difftap.artifacts.run import ProgressBar, no_bar
from difftap.artifacts.table import plain
from difftap.backbones.checkpoint import Checkpoint
from difftap.pipeline.pipeline import Provider
from difftap.prototypes import PrototypeTable, SceneSource, build, is_built
from difftap.recipe import Recipe
from difftap.study.axes import (
    OFFSETS,
    SOURCE,
    STUDY_METRICS,
    TIMESTEPS,
    Case,
    columns,
    layer_cases,
    published_dunn,
    step_cases,
    union_recipe,
)
from difftap.study.sets import EQ17, PairSet, aligned_distances, analyse, pair_sets
from difftap.study.statistics import DistanceSet
from difftap.study.transforms import TRANSFORMS, transform_of, transformed
from difftap.study.video import clips, offset_results

__all__ = ["SCHEMA", "VIDEO", "Study", "base_case", "prepare", "run_axis", "still_sources", "tables"]

SCHEMA = 1
VIDEO = "davis"
"""The data set whose scenes are frames of clips."""


@dataclass(frozen=True)
class Study:
    """What a run of the study does.

    Attributes:
        recipe: a recipe of one branch: the study's taps and timestep.
        model: the checkpoint that it names.
        model_key: the checkpoint's key in the cache.
        backend: name of the backend, not ``auto``; tables of another backend are not used.
        precision: precision of its engines; tables of another precision are not used.
        opener: opens a pipeline for a recipe.
        folder: the folder of everything that is written.
        rule: how masks choose cells.
        metric: the metric of every axis except ``distances``.
        metrics: the metrics of the axis ``distances``.
        timesteps: the timesteps of the axis ``steps``.
        offsets: the offsets of the axis ``video``, in frames.
        draws: bootstrap draws.
        seed: seed of the bootstrap and of samples.
        device: where distances are computed, ``cpu`` or ``cuda``.
        overwrite: build tables again even if they exist, each once.
        say: called with what is being done.
        bar: makes a progress bar for a number of images.
        fresh: the tables that this run has built.
    """

    recipe: Recipe
    model: Checkpoint
    model_key: str
    backend: str
    precision: str
    opener: Callable[[Recipe], Provider]
    folder: Path
    rule: str = "area"
    metric: str = "correlation"
    metrics: tuple[str, ...] = STUDY_METRICS
    timesteps: tuple[int, ...] = TIMESTEPS
    offsets: tuple[int, ...] = OFFSETS
    draws: int = 1000
    seed: int = 0
    device: str = "cpu"
    overwrite: bool = False
    say: Callable[[str], None] = field(default=lambda text: None)
    bar: ProgressBar = no_bar
    fresh: set[Path] = field(default_factory=set)

    @property
    def conditions(self) -> JsonObject:
        """The conditions that an existing table must have been made under to be used."""
        return {"model": {"key": self.model_key}, "backend": {"name": self.backend, "precision": self.precision}}


def base_case(study: Study) -> Case:
    """Give the case of the recipe's own taps and timestep."""
    branch = study.recipe.branches[0]
    return Case("+".join(branch.taps), branch.taps, branch.timestep, "base")


def still_sources(sources: Mapping[str, SceneSource]) -> dict[str, SceneSource]:
    """Keep the data sets of single images."""
    return {name: source for name, source in sources.items() if name != VIDEO}


def tables(study: Study, source: SceneSource, cases: Sequence[Case], name: str) -> list[PrototypeTable]:
    """Give the table of prototypes of each case, in order; build those that do not exist in one pass.

    Args:
        study: gives recipe, model and folder.
        source: the scenes.
        cases: the cases.
        name: name of the tables' folder below ``prototypes``.

    Raises:
        InputError: no object can be used.
        OutputError: a table cannot be written, or its file is another table.
    """
    folder = study.folder / "prototypes" / name
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = {case: columns(study.recipe, study.model, [case], folder)[0] for case in cases}
    missing = [
        case
        for case, column in wanted.items()
        # A table that this run has built itself is not built again for the next axis.
        if (study.overwrite and column.path not in study.fresh)
        or not is_built(source, column, study.rule, study.conditions)
    ]
    if missing:
        recipe = union_recipe(study.recipe, study.model, missing)
        to_build = columns(study.recipe, study.model, missing, folder)
        # A scratch folder for this set of tables, so that an axis does not continue another axis' unfinished work.
        mark = hashlib.sha256("\n".join(column.path.name for column in to_build).encode()).hexdigest()[:12]
        study.say(f"{name}: {len(source)} images, {len(to_build)} tables of prototypes to build")
        with study.opener(recipe) as pipeline, study.bar(len(source)) as advance:
            built = build(
                source,
                pipeline,
                to_build,
                rule=study.rule,
                progress=advance,
                overwrite=study.overwrite,
                scratch=folder / f".{mark}.parts",
            )
        study.fresh.update(column.path for column in to_build)
        for left in folder.glob(".*.parts"):
            shutil.rmtree(left, ignore_errors=True)  # left by a run that was stopped between two tables
        for key, why in built.failures[:10]:
            study.say(f"  {key} failed: {why}")
        study.say(f"{name}: {built.rows} objects of {built.images} images, {len(built.failures)} images failed")
    return [PrototypeTable.load(wanted[case].path) for case in cases]


def _about(table: PrototypeTable) -> JsonObject:
    """Give the conditions and counts that go with a data set's figures."""
    made = table.provenance
    return {
        "conditions": made["conditions"],
        "data": made["data"],
        "rule": made["rule"],
        "counts": {
            **made["counts"],
            "classes": {str(k): int(n) for k, n in zip(*np.unique(table.classes, return_counts=True), strict=True)},
        },
        "failures": made["failures"],
    }


def _cased(study: Study, case: Case, table: PrototypeTable, metric: str) -> JsonObject:
    sets = pair_sets(table, metric, device=study.device, seed=study.seed)
    about = {"label": case.label, "group": case.group, "taps": list(case.taps), "timestep": case.timestep}
    more = {"metric": metric, "width": table.width, "kept_by_largest_cell": int(table.small.sum())}
    return {**about, **more, **analyse(sets, draws=study.draws, seed=study.seed)}


def _distances(study: Study, sources: Mapping[str, SceneSource]) -> JsonObject:
    """Compute Fig. 3 and Table 1: the five measures on the study's layer."""
    case, made = base_case(study), {}
    for name, source in still_sources(sources).items():
        [table] = tables(study, source, [case], name)
        cases = []
        for metric in study.metrics:
            study.say(f"{name}: {metric} distances of {len(table)} prototypes")
            cases.append({**_cased(study, case, table, metric), "published_dunn": published_dunn(name, metric)})
        made[name] = {**_about(table), "cases": cases}
    return {"datasets": made, "published": SOURCE}


def _compared(study: Study, sources: Mapping[str, SceneSource], cases: Sequence[Case]) -> JsonObject:
    """Compute an axis whose cases are tables of the same objects."""
    made = {}
    for name, source in still_sources(sources).items():
        found = tables(study, source, cases, name)
        rows = []
        for case, table in zip(cases, found, strict=True):
            study.say(f"{name}: {case.label} ({table.width} channels)")
            rows.append(_cased(study, case, table, study.metric))
        made[name] = {**_about(found[0]), "cases": rows}
    return {"datasets": made}


def _transforms(study: Study, sources: Mapping[str, SceneSource]) -> JsonObject:
    """Compute Fig. 8: each object against itself in the transformed image, beside pairs of untransformed images."""
    case, made = base_case(study), {}
    for name, source in still_sources(sources).items():
        [plain_table] = tables(study, source, [case], name)
        [table] = tables(study, transformed(source), [case], f"{name}-transforms")
        known = pair_sets(plain_table, study.metric, device=study.device, seed=study.seed)
        base = {key: known[key] for key in ("scsi", "dcsi")}
        row_of = {str(one): k for k, one in enumerate(plain_table.instances)}
        image_of = np.unique(plain_table.images, return_inverse=True)[1].ravel()
        kinds = np.array([transform_of(str(key)) for key in table.images])
        there = np.array([str(one) in row_of for one in table.instances], np.bool_)
        rows = []
        for kind in TRANSFORMS:
            mine = np.flatnonzero((kinds == kind) & there)
            original = np.array([row_of[str(one)] for one in table.instances[mine]], np.int64)
            values = aligned_distances(
                plain_table.vectors[original], table.vectors[mine], study.metric, study.device
            ).astype(np.float64)
            images = image_of[original]
            mean = float(values.mean()) if len(values) else float("nan")
            std = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            own = PairSet(DistanceSet(values, images, images), len(values), mean, std)
            about = {"label": kind, "group": "transforms", "metric": study.metric}
            rows.append({**about, **analyse({"sidi": own, **base}, EQ17, draws=study.draws, seed=study.seed)})
        made[name] = {**_about(plain_table), "cases": rows}
    return {"datasets": made}


def _video(study: Study, sources: Mapping[str, SceneSource]) -> JsonObject:
    """Compute Fig. 9: distance over offset. Fig. 10 is drawn from the same table."""
    [table] = tables(study, sources[VIDEO], [base_case(study)], VIDEO)
    found = clips(table, study.metric, study.device)
    results = offset_results(found, study.offsets, draws=study.draws, seed=study.seed)
    return {"datasets": {VIDEO: {**_about(table), "metric": study.metric, **results}}}


def _cases(study: Study, axis: str) -> tuple[Case, ...]:
    """List the cases of an axis."""
    branch = study.recipe.branches[0]
    if axis == "layers":
        return layer_cases(study.model, study.recipe.size, branch.timestep)
    if axis == "steps":
        return step_cases(branch.taps, study.timesteps)
    return (base_case(study),)


def prepare(study: Study, sources: Mapping[str, SceneSource], axes: Sequence[str]) -> None:
    """Build the tables of several axes in one pass over each data set, so that each image is encoded once."""
    cases = [case for axis in axes if axis != "video" for case in _cases(study, axis)]
    for name, source in still_sources(sources).items():
        if cases:
            tables(study, source, cases, name)


def run_axis(study: Study, axis: str, sources: Mapping[str, SceneSource]) -> JsonObject:
    """Compute the results of one axis as plain data, ready for JSON.

    Raises:
        InputError: no object can be used.
    """
    if axis == "distances":
        results = _distances(study, sources)
    elif axis in ("layers", "steps"):
        results = _compared(study, sources, _cases(study, axis))
    elif axis == "transforms":
        results = _transforms(study, sources)
    else:
        results = _video(study, sources)
    settings = {
        "metric": study.metric,
        "rule": study.rule,
        "draws": study.draws,
        "seed": study.seed,
        "recipe": study.recipe.to_dict(),
    }
    done = plain({"schema": SCHEMA, "axis": axis, "settings": settings, **results})
    # Through JSON once, so that results are the same whether they were just computed or read from their file.
    read: JsonObject = json.loads(json.dumps(done, allow_nan=False))
    return read
