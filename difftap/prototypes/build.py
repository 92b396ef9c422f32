"""Build tables of prototypes from scenes, streaming and resumable.

The work is done in steps of a few images. A step writes its rows as one file per table, and then a record of the run.
A run that was stopped in any way continues after its last record; the files of a step without a record are written
again. When all steps are done, their files are joined. The tables are the same, byte for byte, as those of a run that
was not stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from difftap.artifacts.files import JsonObject, no_folder, only_writer, output_errors
from difftap.artifacts.run import check_conditions, open_run
from difftap.datasets.objects import Scene, SceneSource, mask_boxes
from difftap.engine import Features, finite_or_alone
from difftap.errors import InputError, NonFiniteError, OutputError
from difftap.pipeline.pipeline import Provider
from difftap.prompts.learned import pinned
from difftap.prototypes.average import average, joined_grid
from difftap.prototypes.cells import KeptCells, keep_cells
from difftap.prototypes.prototype_table import PrototypeTable, load_provenance, save_stream
from difftap.recipe import Recipe

__all__ = ["BuildSummary", "TableSpec", "build", "is_built", "narrowed", "recipe_column"]

_STEP = 16
"""At least so many images are one step, the work that a killed run may have to do again."""


@dataclass(frozen=True)
class TableSpec:
    """One table to build, and the maps that its prototypes are made from.

    Attributes:
        path: the Parquet file.
        recipe: the recipe that gives exactly these maps. Its keys identify the table, so learned prompts in it are
            replaced by the digest of their file.
        taps: the text for the table's column ``tap``.
        timestep: the timestep of the pass; -1 if the maps come from passes at several timesteps.
        parts: for each map, the number of its branch in the pipeline's recipe, and its tap.
    """

    path: Path
    recipe: Recipe
    taps: str
    timestep: int
    parts: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", pinned(self.recipe))


@dataclass(frozen=True)
class BuildSummary:
    """What a run did.

    Attributes:
        rows: prototypes in each table.
        images: images that gave at least one prototype.
        empty: images without a wanted object.
        resumed: images that an earlier run had done.
        small: for each table, the objects so small that only their largest cell was kept.
        left_out: number of annotated objects that were not wanted, by reason.
        failures: images that could not be used, and why.
    """

    rows: int
    images: int
    empty: int
    resumed: int
    small: tuple[int, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    failures: tuple[tuple[str, str], ...] = ()


def recipe_column(path: Path, recipe: Recipe) -> TableSpec:
    """Describe the table that joins every tap of every branch of a recipe, in the recipe's order."""
    times = {branch.timestep for branch in recipe.branches}
    parts = tuple((k, tap) for k, branch in enumerate(recipe.branches) for tap in branch.taps)
    label = "+".join(tap if len(times) == 1 else f"{tap}@{recipe.branches[k].timestep}" for k, tap in parts)
    return TableSpec(path, recipe, label, times.pop() if len(times) == 1 else -1, parts)


def _identity(source: SceneSource, column: TableSpec, rule: str) -> dict[str, object]:
    """Give what must be equal for two tables to be the same one."""
    # The names of the scenes as a digest: a data set may have 100,000 of them.
    keys = hashlib.sha256("\n".join(source.keys).encode()).hexdigest()[:16]
    data = {**source.about, "name": source.name, "scenes": len(source), "keys": keys}
    return {"feature_key": column.recipe.feature_key(), "taps": column.taps, "rule": rule, "data": data}


def is_built(source: SceneSource, column: TableSpec, rule: str, conditions: JsonObject) -> bool:
    """Tell whether a table is already built.

    Args:
        source: the scenes.
        column: the table.
        rule: how masks choose cells.
        conditions: the conditions of the pipeline that would build it. The table must have the same model key, backend
            and precision, and its features must come from the same store.

    Raises:
        OutputError: the file is another table, or no table.
    """
    if not column.path.exists():
        return False
    try:
        known = load_provenance(column.path)
    except InputError as error:
        raise OutputError(f"cannot write '{column.path}': {error}; choose another file, or --overwrite") from error
    wanted = {**_identity(source, column, rule), "model_key": conditions["model"]["key"], **_made_by(conditions)}
    have = {**known, **_made_by(known.get("conditions", {}))}
    plain = json.loads(json.dumps(wanted))  # as the table's own came through JSON: tuples became lists
    check_conditions(column.path, {name: have.get(name) for name in plain}, plain, begun="built")
    return True


def _made_by(conditions: JsonObject) -> dict[str, object]:
    backend = conditions.get("backend", {})
    return {
        "backend": backend.get("name"),
        "precision": backend.get("precision"),
        "store": conditions.get("store"),
    }


def build(
    source: SceneSource,
    pipeline: Provider,
    columns: Sequence[TableSpec],
    *,
    rule: str = "area",
    progress: Callable[[int], None] = lambda count: None,
    overwrite: bool = False,
    scratch: Path | None = None,
) -> BuildSummary:
    """Build some tables in one pass over the scenes.

    Args:
        source: the scenes.
        pipeline: gives the maps that the tables need.
        columns: the tables; their folders must exist.
        rule: how masks choose cells, one of `difftap.prototypes.cells.RULES`.
        progress: called with the number of images done since the last call.
        scratch: folder for unfinished work; by default a hidden one beside the first table.
        overwrite: start again, and remove what an earlier run left.

    Raises:
        OutputError: a table or its scratch folder cannot be written, or belongs to a run with other conditions.
        InputError: no scene gives a prototype.
    """
    folder = scratch or columns[0].path.with_name(f".{columns[0].path.name}.parts")
    header = _header(source, pipeline, columns, rule)
    path = columns[0].path
    no_folder(path)
    with only_writer(path):
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with open_run(folder / "run.jsonl", header, place=path) as run:
            records = {int(record["start"]): record for record in run.earlier}
            resumed = 0
            for start in range(0, len(source), int(header["step"])):
                keys = source.keys[start : start + int(header["step"])]
                if start in records:
                    resumed += len(keys)
                else:
                    records[start] = _step(source, pipeline, columns, rule, keys, folder, start)
                    run.write(records[start])
                progress(len(keys))
        built = _finish(folder, columns, source, header, records, resumed)
        shutil.rmtree(folder, ignore_errors=True)
    return built


def _header(source: SceneSource, pipeline: Provider, columns: Sequence[TableSpec], rule: str) -> JsonObject:
    step = -(-_STEP // pipeline.batch) * pipeline.batch  # rounded up to whole batches, which no step should split
    # The pipeline's recipe may hold more maps than these tables need. Each table is identified by its own recipe.
    conditions = {k: v for k, v in pipeline.conditions.items() if k not in ("recipe", "recipe_key")}
    return {
        "schema": "difftap.prototypes.build/1",
        "step": step,
        "keys": list(source.keys),
        "conditions": conditions,
        "columns": [_identity(source, column, rule) for column in columns],
    }


def _part(folder: Path, start: int, index: int) -> Path:
    return folder / f"{start:09d}-{index:03d}.parquet"


def _step(
    source: SceneSource,
    pipeline: Provider,
    columns: Sequence[TableSpec],
    rule: str,
    keys: Sequence[str],
    folder: Path,
    start: int,
) -> JsonObject:
    """Do one step: write a file per table, and give the step's record. The step counts once the record is written."""
    record: JsonObject = {"start": start, "images": 0, "empty": 0, "failures": [], "left_out": Counter()}
    tables: list[list[PrototypeTable]] = [[] for _ in columns]
    for scene, features in _features(source, pipeline, keys, record):
        for made, table in zip(tables, _tables(scene, features, columns, rule), strict=True):
            made.append(table)
        record["images"] += 1
    record["rows"] = sum(len(table) for table in tables[0])
    record["small"] = [int(sum(table.small.sum() for table in made)) for made in tables]
    if record["rows"]:
        for k, made in enumerate(tables):
            PrototypeTable.concat(made).save(_part(folder, start, k))
    return record


def _features(
    source: SceneSource, pipeline: Provider, keys: Sequence[str], record: JsonObject
) -> Iterator[tuple[Scene, Features]]:
    """Yield the scenes that hold a wanted object, with their features; record the others."""

    def run(scenes: Sequence[Scene]) -> list[Features]:
        return list(pipeline.features([scene.image for scene in scenes]))

    for start in range(0, len(keys), pipeline.batch):
        scenes = list(_wanted_scenes(source, keys[start : start + pipeline.batch], record))
        for some, made in finite_or_alone(run, scenes):
            if isinstance(made, NonFiniteError):
                record["failures"].append([some[0].key, " ".join(str(made).split())])
            else:
                yield from zip(some, made, strict=True)


def _wanted_scenes(source: SceneSource, keys: Sequence[str], record: JsonObject) -> Iterator[Scene]:
    """Read the scenes that hold a wanted object; record scenes that hold none or cannot be read."""
    for key in keys:
        try:
            scene = source.read(key)
        except InputError as error:
            record["failures"].append([key, " ".join(str(error).split())])
            continue
        record["left_out"].update(scene.left_out)
        if scene.objects:
            yield scene
        else:
            record["empty"] += 1


def _tables(scene: Scene, features: Features, columns: Sequence[TableSpec], rule: str) -> Iterator[PrototypeTable]:
    """Yield the rows of each table for a scene's objects."""
    known: dict[tuple[int, int], KeptCells] = {}  # by grid: many tables have the same
    count, boxes = len(scene.objects), mask_boxes(scene.masks)
    for column in columns:
        maps = [features.branches[branch][tap] for branch, tap in column.parts]
        grid = joined_grid(maps)
        if grid not in known:
            known[grid] = keep_cells(scene.masks, maps[0].geometry, grid, rule)
        cells = known[grid]
        yield PrototypeTable(
            average(maps, cells),
            classes=np.array([one.category for one in scene.objects]),
            images=np.array([scene.key] * count),
            instances=np.array([one.instance for one in scene.objects]),
            areas=np.array([one.area for one in scene.objects], np.float32),
            coverages=cells.coverage,
            cells=cells.counts,
            small=cells.small,
            taps=np.array([column.taps] * count),
            timesteps=np.full(count, column.timestep, np.int32),
            boxes=boxes,
        )


def _finish(
    folder: Path,
    columns: Sequence[TableSpec],
    source: SceneSource,
    header: JsonObject,
    steps: Mapping[int, JsonObject],
    resumed: int,
) -> BuildSummary:
    """Join the steps' files into the tables."""
    records = sorted(steps.items())
    left_out: Counter[str] = Counter()
    for _, record in records:
        left_out.update(record["left_out"])
    built = BuildSummary(
        rows=sum(record["rows"] for _, record in records),
        images=sum(record["images"] for _, record in records),
        empty=sum(record["empty"] for _, record in records),
        resumed=resumed,
        small=tuple(sum(record["small"][k] for _, record in records) for k in range(len(columns))),
        left_out=dict(sorted(left_out.items())),
        failures=tuple((key, why) for _, record in records for key, why in record["failures"]),
    )
    if not built.rows:
        shutil.rmtree(folder, ignore_errors=True)
        why = f" ({built.failures[0][0]}: {built.failures[0][1]})" if built.failures else ""
        raise InputError(
            f"no object of '{source.name}' gives a prototype: {len(built.failures)} images failed{why}, {built.empty} "
            f"have no object that is wanted ({_reasons(built.left_out)}); widen --min-area or the classes"
        )
    filled = [start for start, record in records if record["rows"]]
    # The first table last, because it is what shows that the run is finished: the lock and the scratch folder are its.
    for k in reversed(range(len(columns))):
        files = [_part(folder, start, k) for start in filled]
        width = PrototypeTable.load(files[0]).width
        provenance = _provenance(columns[k], header, k, built)
        save_stream(columns[k].path, map(PrototypeTable.load, files), width, provenance)
    return built


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none annotated"


def _provenance(column: TableSpec, header: JsonObject, index: int, built: BuildSummary) -> dict[str, object]:
    conditions = header["conditions"]
    return {
        **header["columns"][index],
        "recipe_key": column.recipe.key(),
        "model_key": conditions["model"]["key"],
        "difftap": conditions["difftap"],
        "conditions": {**conditions, "recipe": column.recipe.to_dict(), "recipe_key": column.recipe.key()},
        "counts": {
            "objects": built.rows,
            "images": built.images,
            "images_without_objects": built.empty,
            "images_failed": len(built.failures),
            "kept_by_largest_cell": built.small[index],
            "left_out": dict(built.left_out),
        },
        "failures": [list(failure) for failure in built.failures],
    }


def narrowed(recipe: Recipe, taps: tuple[str, ...], timestep: int) -> Recipe:
    """Make a recipe with one branch: the first branch's, with other taps and another timestep."""
    return replace(recipe, branches=(replace(recipe.branches[0], taps=taps, timestep=timestep, weight=1.0),))
